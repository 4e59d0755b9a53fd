"""Other functions that a plugin needs beside its own, such as the PF of its VF: what `Device.open` is given.

A companion is opened by the server, driven by one task of the plugin's for the whole process, and shared by all
devices that name it. Nothing here knows how a door is opened or who else uses it.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

import trio

from vfu_server.host_device import HostDevice

T = TypeVar("T")


class Companions(Protocol):
    """The other functions that one device may use. For the trio thread."""

    def open(
        self, where: str, serve: Callable[[HostDevice, "trio.TaskStatus[T]"], Awaitable[None]]
    ) -> AbstractAsyncContextManager[T]:
        """Use the function at `where` for the time of the `async with`; gives what `serve` has started with.

        `where`: a BDF (kernel VFIO); a path with a slash (a vfio-user device's socket); or a word: of a device behind a
        socket the socket beside it, `PATH.word`, of a PCI function `pf`, the physical function that it belongs to.

        The first user of a `where` makes the server open its door and run `serve(host, task_status)` in a task of its
        own; `task_status.started(value)` ends everyone's waiting, and every user gets that `value`. When the last user
        has left, the task is cancelled, and the door is closed once it has ended. The host has no guest: its whole DMA
        space is the plugin's (see `dma_memory`), its events are read by the server.

        HostError, which names `where`: it cannot be opened, is not such a function, or `serve` ended or raised before
        or after it had started. Whoever uses it when that happens learns it from the value's own methods.
        """
        ...
