"""Runs checks on a bench, one after the other; whatever one does, the next is run."""

import time
import traceback
from collections.abc import Callable, Sequence

from vfu_server.errors import VfuServerError
from vfu_server.testing.conformance import accesses, declared, faults, hostile, pace, saved, states
from vfu_server.testing.conformance.bench import Bench
from vfu_server.testing.conformance.records import CHECKS, Check, Failed, NotJudged, Result, Verdict, Warned

ORDER = (declared, states, saved, accesses, hostile, faults, pace)
"""The modules whose checks there are; importing them has made CHECKS."""
CHECKS.sort(key=lambda one: [module.__name__ for module in ORDER].index(one.work.__module__))


def run(
    bench: Bench, checks: Sequence[Check] = (), tell: Callable[[Result], None] = lambda _result: None
) -> list[Result]:
    """The results of `checks`, of all if none are named; `tell` is given each as soon as it is there."""
    found = []
    for one in checks or CHECKS:
        begun = time.monotonic()
        verdict, text = _judge(bench, one)
        bench.tidy()
        result = Result(bench.target.name, one, verdict, text, time.monotonic() - begun)
        tell(result)
        found.append(result)
    return found


def _judge(bench: Bench, one: Check) -> tuple[Verdict, str]:
    try:
        if one.migrates and not bench.capabilities.migratable:
            return Verdict.NOT_JUDGED, f"the device cannot be migrated: {bench.capabilities.reason}"
        text = one.work(bench)
        bench.unexpected()
    except Failed as finding:
        return Verdict.FAILED, str(finding)
    except Warned as finding:
        return Verdict.WARNED, str(finding)
    except NotJudged as finding:
        return Verdict.NOT_JUDGED, str(finding)
    except VfuServerError as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        return Verdict.FAILED, f"{type(error).__name__}: {error}{notes}; {bench.why()}"
    except Exception:  # noqa: BLE001 - a plugin may raise anything
        return Verdict.FAILED, traceback.format_exc()
    return Verdict.PASSED, text
