"""Queues, when they are empty, and waiting for that.

Nothing here stops new work from coming in: the policy has closed the doorbells before. It must not know of migration.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from plugins.generic_dmaq.port import Port
from vfu_server.errors import DeadlineError

FIRST_PAUSE = 0.0002
LONGEST_PAUSE = 0.02
"""Seconds between two looks: short at first, since most queues are empty at once; doubled up to the longest."""


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue of the device, by the names of its registers and fields (`register.field`).

    It is empty if no field of `busy` is set, `idle` (if there is one) holds one of `idle_values`, and `head` equals
    `tail` (if there are any). `show` is what a message about it tells.
    """

    name: str
    doorbells: tuple[str, ...]
    busy: tuple[str, ...] = ()
    idle: str = ""
    idle_values: tuple[int, ...] = ()
    head: str = ""
    tail: str = ""
    show: tuple[str, ...] = ()

    def empty(self, port: Port) -> bool:
        """Nothing is left to do."""
        if any(port.field(path) for path in self.busy):
            return False
        if self.idle and port.field(self.idle) not in self.idle_values:
            return False
        return not self.head or port.read(self.head) == port.read(self.tail)

    def text(self, port: Port) -> str:
        """The queue's name and what its registers read now."""
        return f"queue {self.name!r} ({port.show(self.show)})"


async def drain(port: Port, queues: Sequence[Queue], seconds: float, settle: float) -> float:
    """Wait until all `queues` are empty and stay so for `settle` seconds; returns the seconds it took.

    `settle` covers what hardware does behind its idle bit (an interrupt), and a doorbell it has not looked at yet.
    DeadlineError after `seconds`: it names the queues and what their registers read. Nothing was changed then.
    """
    began = trio.current_time()
    empty_since: float | None = None
    pause = FIRST_PAUSE
    while True:
        busy = [queue for queue in queues if not queue.empty(port)]
        now = trio.current_time()
        if busy:
            empty_since = None
        elif empty_since is None:
            empty_since, pause = now, FIRST_PAUSE
        elif now - empty_since >= settle:
            return now - began
        if busy and now - began >= seconds:
            names = "; ".join(queue.text(port) for queue in busy)
            raise DeadlineError(f"{port.host.name}: not empty after {seconds:g} s: {names}")
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
