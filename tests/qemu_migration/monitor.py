"""Owns a QMP connection as tests of migration use it: commands, events, and waiting for either with a deadline.

Must not know what is migrated.
"""

import json
import socket
import time
from typing import Any

SECONDS = 120.0


class QmpError(Exception):
    """QEMU refused a command; the text is its own."""


class Monitor:
    """One connection, ready for commands. Events are kept until somebody waits for them."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(SECONDS)
        self._lines = sock.makefile("rb")
        self.events: list[dict[str, Any]] = []
        try:
            self._message()
            self.execute("qmp_capabilities")
        except BaseException:
            self._lines.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """What QEMU returns; names of arguments have _ for -. Raises QmpError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._sock.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while True:
            message = self._message()
            if "error" in message:
                raise QmpError(message["error"]["desc"])
            if "return" in message:
                return message["return"]
            self.events.append(message)

    def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """The next event of that name whose data has these fields; it and all before it are forgotten."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return event
            self.events.append(self._message())

    def wait_migration(self, *statuses: str, seconds: float = SECONDS) -> dict[str, Any]:
        """query-migrate once its status is one of these, or the migration has come to any end."""
        deadline = time.monotonic() + seconds
        while True:
            found: dict[str, Any] = self.execute("query-migrate")
            if found.get("status") in (*statuses, "completed", "failed", "cancelled"):
                return found
            assert time.monotonic() < deadline, found
            self._rest(0.02)

    def close(self) -> None:
        """Let go of it."""
        self._lines.close()
        self._sock.close()

    def _message(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise QmpError("QEMU went away")
        message: dict[str, Any] = json.loads(line)
        return message

    def _rest(self, seconds: float) -> None:
        """Between two questions: an event comes earlier."""
        self._sock.settimeout(seconds)
        try:
            if self._sock.recv(1, socket.MSG_PEEK):
                self._sock.settimeout(SECONDS)
                self.events.append(self._message())
        except TimeoutError:
            pass
        finally:
            self._sock.settimeout(SECONDS)
