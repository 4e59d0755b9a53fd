"""`vfu-migrate --qmp`: whether a running QEMU can carry its vfio-user devices to another host, asked by QMP.

It changes nothing in the machine. It must not know servers: a server has one client, and that is QEMU.
"""

import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from vfu_server.errors import VfuServerError
from vfu_server.tools.outcome import place_error

DRIVER = "vfio-user-pci"
PROPERTY = "enable-migration"
TIMEOUT = 30.0
"""Seconds for an answer: QEMU's main loop may be busy."""
LONGEST = 16 << 20

NO_WAY = (
    "its `migrate`, `savevm` and cpr-reboot would say `completed`, and the devices' state would be gone: use none",
    "missing to move the state from outside: a second connection to the server, which has one client at a time (QEMU),",
    "    and a supported command that gives the destination's QEMU back its MSI-X table and interrupts",
    "ways out: device_del before the migration and device_add after it;",
    f"    or a QEMU whose {DRIVER} has `{PROPERTY}` (docs/operators/qemu-migration.md)",
)


class QmpError(VfuServerError):
    """QEMU refused a command, or what answers is no QEMU."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What QEMU says. `devices`: their paths; `reasons`: why it would refuse; `able`: the client knows migration."""

    version: str
    devices: tuple[str, ...]
    able: bool
    reasons: tuple[str, ...]

    @property
    def good(self) -> bool:
        """A migration carries the devices' state."""
        return not self.devices or (self.able and not self.reasons)

    def lines(self) -> list[str]:
        """For people."""
        said = [f"QEMU {self.version}, {len(self.devices)} of {DRIVER}: {', '.join(self.devices) or 'none'}"]
        if not self.devices:
            return [*said, "nothing of ours is in this machine"]
        if not self.able:
            return [*said, f"this QEMU cannot migrate {DRIVER}, and does not refuse to", *NO_WAY]
        if self.reasons:
            return [*said, "this QEMU refuses to migrate:", *(f"  {reason}" for reason in self.reasons)]
        return [*said, "`migrate` carries the state of these devices, to a QEMU that can as well"]


class Qmp:
    """A QMP connection. Raises PlaceError if it cannot be had, QmpError for all that is said on it."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise place_error("connected to", path, error) from error
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()

    def greet(self) -> str:
        """Enter command mode; QEMU's version."""
        greeting = self._message()
        try:
            numbers = greeting["QMP"]["version"]["qemu"]
            version = f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}"
        except (KeyError, TypeError):
            raise QmpError("this is no QMP socket") from None
        self.ask("qmp_capabilities")
        return version

    def ask(self, command: str, **arguments: str) -> Any:
        """What QEMU returns; names of arguments have _ for -."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"{command}: {error.strerror}") from error
        while True:
            message = self._message()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{command}: {message['error'].get('desc', 'refused')}")

    def _message(self) -> dict[str, Any]:
        try:
            line = self._lines.readline(LONGEST)
            message = json.loads(line) if line else None
        except TimeoutError:
            raise QmpError("no answer: a QMP socket serves one client, and another one may be there") from None
        except (OSError, ValueError) as error:
            raise QmpError(f"this is no QMP socket: {error}") from error
        if not isinstance(message, dict):
            raise QmpError("the QMP socket was closed" if message is None else "this is no QMP socket")
        return message


def examine(path: str) -> Verdict:
    """Ask the QEMU whose QMP socket is at `path`. Raises PlaceError, QmpError."""
    with Qmp(path) as qmp:
        version = qmp.greet()
        devices = tuple(
            f"{folder}/{entry['name']}"
            for folder in ("/machine/peripheral", "/machine/peripheral-anon")
            for entry in qmp.ask("qom-list", path=folder)
            if entry.get("type") == f"child<{DRIVER}>"
        )
        able = False
        if devices:
            known = qmp.ask("device-list-properties", typename=DRIVER)
            able = any(entry.get("name") == PROPERTY for entry in known)
        reasons = qmp.ask("query-migrate").get("blocked-reasons", [])
    return Verdict(version, devices, able, tuple(map(str, reasons)))
