"""What the service manager is told: readiness, status, the end, and that we are alive (sd_notify's protocol).

Without NOTIFY_SOCKET everything here does nothing. It must not know what is served.
"""

import logging
import os
import socket
from collections.abc import MutableMapping

import trio

logger = logging.getLogger(__name__)


class Notifier:
    """Sends datagrams of `KEY=value` lines to the service manager. Never blocks, never fails."""

    def __init__(self, address: str = "", watchdog_seconds: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds
        """The manager kills us after so many seconds of silence; 0: it does not watch."""

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> "Notifier":
        """Take NOTIFY_SOCKET and WATCHDOG_* out of `environ`, so that our children do not speak for us."""
        address = environ.pop("NOTIFY_SOCKET", "")
        interval = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        if address and not address.startswith(("/", "@")):
            logger.warning(
                "NOTIFY_SOCKET=%s is neither a path nor an abstract name: the service manager is not notified", address
            )
            address = ""
        ours = not pid or pid == str(os.getpid())
        seconds = int(interval) / 1e6 if address and ours and interval.isascii() and interval.isdigit() else 0.0
        return cls(address, seconds)

    def send(self, *assignments: str) -> None:
        """Send `KEY=value` lines in one datagram."""
        if not self._address:
            return
        message = "\n".join(assignments).encode()
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as channel:
                channel.sendto(message, socket.MSG_NOSIGNAL, self._address)
        except OSError as error:
            logger.debug("the service manager at %r does not listen: %s", self._address, error)

    def ready(self, status: str) -> None:
        """All sockets listen."""
        self.send("READY=1", _status(status))

    def status(self, status: str) -> None:
        """One line for `systemctl status`."""
        self.send(_status(status))

    def stopping(self) -> None:
        """The end has begun."""
        self.send("STOPPING=1", _status("bringing devices to rest"))

    async def watchdog(self) -> None:
        """Say that the event loop turns, twice in each interval; returns at once where nobody watches."""
        while self.watchdog_seconds > 0:
            self.send("WATCHDOG=1")
            await trio.sleep(self.watchdog_seconds / 2)


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())
