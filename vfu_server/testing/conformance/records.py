"""What a check is, and what it can find: `Failed`, `Warned`, `NotJudged`, or a note that all is well."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfu_server.testing.conformance.bench import Bench


class Verdict(enum.StrEnum):
    """How a check ended."""

    PASSED = "passed"
    WARNED = "warned"
    """Worth a look: a figure that depends on the machine, or a habit that is no breach of the contract."""
    FAILED = "failed"
    NOT_JUDGED = "not judged"
    """It does not apply to this device, or its state says nothing."""


class Failed(Exception):  # noqa: N818 - a finding
    """The plugin breaks its contract; the message says where, and what should be."""


class Warned(Exception):  # noqa: N818 - a finding
    """See Verdict.WARNED."""


class NotJudged(Exception):  # noqa: N818 - a finding
    """See Verdict.NOT_JUDGED; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check: `name` as on the command line, `title` what must hold."""

    name: str
    title: str
    work: Callable[["Bench"], str]
    migrates: bool
    """It needs a device that can be migrated."""


@dataclass(frozen=True, slots=True)
class Result:
    """How `check` ended on `target`; `text` says what was found or seen."""

    target: str
    check: Check
    verdict: Verdict
    text: str
    seconds: float


CHECKS: list[Check] = []
"""All checks, in the order in which they are run."""


def check(name: str, title: str, *, migrates: bool = True) -> Callable[[Callable[["Bench"], str]], Check]:
    """Make a function a check. It returns a note for people, or raises one of the findings."""

    def made(work: Callable[["Bench"], str]) -> Check:
        found = Check(name, title, work, migrates)
        CHECKS.append(found)
        return found

    return made
