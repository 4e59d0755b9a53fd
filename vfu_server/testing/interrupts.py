"""`Interrupts`: the eventfds of one interrupt index, armed through a client and waited for with a deadline.

It knows SET_IRQS and eventfds; which capability in config space enables an index is `guest`'s.
"""

import os
from types import TracebackType
from typing import Self

from vfu_server import uapi
from vfu_server.errors import DeadlineError
from vfu_server.testing.client import Client


class Interrupts:
    """Vectors 0.. of index `index` (uapi.IrqIndex), each with an eventfd of ours."""

    def __init__(self, client: Client, index: int, count: int = 1) -> None:
        self.client = client
        self.index = index
        self.fds = tuple(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count))

    def arm(self) -> Self:
        """Give the server the eventfds of all vectors. The first time this also enables the index."""
        self.client.set_irq_eventfds(self.index, 0, self.fds)
        return self

    def arm_vector(self, vector: int) -> None:
        """Give the server the eventfd of one vector (again)."""
        self.client.set_irq_eventfds(self.index, vector, [self.fds[vector]])

    def disarm_vector(self, vector: int) -> None:
        """Take the eventfd of one vector away; the index stays enabled."""
        self.client.disarm_irqs(self.index, vector, 1)

    def disable(self) -> None:
        """Switch the index off."""
        self.client.disable_irqs(self.index)

    def mask(self) -> None:
        """Mask INTx."""
        self.client.mask_irq(self.index)

    def unmask(self) -> None:
        """INTx was handled: a line that is still up is signalled again."""
        self.client.unmask_irq(self.index)

    def wait(self, vector: int = 0, timeout: float | None = None) -> int:
        """How often `vector` was signalled since it was last looked at, at least once; DeadlineError if not in time.

        DMA messages of the server are served meanwhile.
        """
        if not self.client.wait_readable(self.fds[vector], timeout):
            raise DeadlineError(f"vector {vector} of interrupt index {self.index} was not signalled in time")
        return self.count(vector)

    def count(self, vector: int = 0) -> int:
        """How often `vector` was signalled since it was last looked at. Never waits."""
        try:
            return os.eventfd_read(self.fds[vector])
        except BlockingIOError:
            return 0

    def counts(self) -> tuple[int, ...]:
        """`count` of every vector."""
        return tuple(self.count(vector) for vector in range(len(self.fds)))

    def close(self) -> None:
        """Close our ends; the server is told nothing. Idempotent."""
        for fd in self.fds:
            os.close(fd)
        self.fds = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def intx(client: Client) -> Interrupts:
    """The pin's interrupt, not yet armed."""
    return Interrupts(client, uapi.IrqIndex.INTX)
