"""What operators are told of a device: one report with all its counters, and how it looks as a log record.

It must not know who asks (a signal, the end of a device, a scrape) nor any monitoring system.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the server starts to listen before it needs a session
    from vfu_server.session_counts import SessionStatistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device as it stands. `statistics` None: it was not served yet. `stage` is that of `server_stage`."""

    name: str
    source: str
    stage: str
    plugin: str = ""
    plugin_version: str = ""
    statistics: "SessionStatistics | None" = None


class Told(dict[str, object]):
    """A mapping that a log line shows in words and a JSON record as an object."""

    def __str__(self) -> str:
        return f"[{', '.join(f'{key} {value}' for key, value in self.items())}]"


def log_report(report: DeviceReport, title: str = "statistics") -> None:
    """One record, level info."""
    logger.info("%s", title, extra={"device": report.name, **fields(report)})


def fields(report: DeviceReport) -> dict[str, object]:
    """The report as the fields of a log record. What never happened is left out of mappings."""
    told: dict[str, object] = {"stage": report.stage}
    found = report.statistics
    if found is None:
        return told
    pump = found.context
    told |= {
        "state": found.state.name,
        "clients": found.clients,
        "messages": pump.messages,
        "replies": pump.replies,
        "error_replies": pump.errors,
        "accesses": _accesses(found),
        "mistakes": Told(found.mistakes),
        "dma_maps": found.host.dma_maps,
        "dma_bytes": found.host.dma_bytes,
        "dma_relays": found.relays,
        "door_requests": found.host.requests,
        "door_errors": found.host.errors,
        "kernel_slow_calls": found.host.slow_calls,
        "arcs": _arcs(found),
        "bytes_saved": found.bytes_saved,
        "bytes_loaded": found.bytes_loaded,
        "resets": found.resets,
        "plugin_overruns": found.overruns,
        "plugin": Told(found.plugin),
    }
    if found.trace is not None:
        told["trace"] = Told(asdict(found.trace))
    return told


def mistakes(found: "SessionStatistics") -> int:
    """All mistakes of clients, those included that came too fast to be told apart."""
    return sum(found.mistakes.values()) + found.context.notices_lost


def _accesses(found: "SessionStatistics") -> Told:
    """By class, answer and direction: `{"running": {"pass": {"read": 5}}}`."""
    told: dict[str, dict[str, dict[str, int]]] = {}
    for (answer, state_class, direction), count in sorted(found.context.accesses.items(), key=lambda pair: pair[0][1]):
        told.setdefault(state_class.name.lower(), {}).setdefault(answer.name.lower(), {})[direction] = count
    return _nested(told)


def _arcs(found: "SessionStatistics") -> Told:
    return Told(
        {
            str(arc): Told(
                done=times.done,
                failed=times.failed,
                ms=round(times.seconds * 1e3, 1),
                longest_ms=round(times.longest * 1e3, 1),
            )
            for arc, times in found.arcs.items()
        }
    )


def _nested(value: Mapping[str, object]) -> Told:
    return Told({key: _nested(inner) if isinstance(inner, dict) else inner for key, inner in value.items()})
