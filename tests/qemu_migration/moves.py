"""Owns moving a guest from one side to the other: capabilities, limits, the channel, and waiting for the end.

Must not know what the guest does.
"""

from pathlib import Path
from typing import Any

from tests.qemu_migration.monitor import QmpError
from tests.qemu_migration.side import Side

PATIENT = 60_000
"""A downtime limit in milliseconds that any machine keeps."""


def prepare(*sides: Side, capabilities: dict[str, bool] | None = None, **parameters: object) -> None:
    """Set the same on all sides: events are told, and no limit that a slow machine could not keep."""
    wanted = {"events": True, "return-path": True} | (capabilities or {})
    for each in sides:
        listed = [{"capability": name, "state": state} for name, state in wanted.items()]
        each.monitor.execute("migrate-set-capabilities", capabilities=listed)
        each.monitor.execute("migrate-set-parameters", **({"downtime_limit": PATIENT, "max_bandwidth": 0} | parameters))


def start(source: Side, destination: Side, **more: object) -> None:
    """Begin; the destination was started with `-incoming defer`."""
    uri = f"unix:{source.folder / 'migration.sock'}"
    Path(uri.removeprefix("unix:")).unlink(missing_ok=True)
    destination.monitor.execute("migrate-incoming", uri=uri, exit_on_error=False)
    source.monitor.execute("migrate", uri=uri, **more)


def move(source: Side, destination: Side) -> dict[str, Any]:
    """All of it; query-migrate of the source, once the guest runs at the destination."""
    start(source, destination)
    return finish(source, destination)


def finish(source: Side, destination: Side) -> dict[str, Any]:
    """The rest of a migration that has begun; query-migrate of the source, once the guest runs at the destination."""
    found = source.monitor.wait_migration()
    assert found["status"] == "completed", (found, source.log, destination.log)
    try:
        destination.monitor.wait_event("RESUME")
    except (TimeoutError, QmpError) as error:
        raise AssertionError(f"the destination does not run: {error!r}\n{destination.log}") from error
    return found
