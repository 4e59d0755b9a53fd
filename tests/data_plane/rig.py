"""Functions of a machine that is not there, each behind a real door, a real Session and real clients over socketpairs.

The kernel is a fake at open(2) and ioctl(2); everything above is the product's. All sessions run in one thread, as in
one server's process. It must not know what is tested.
"""

import contextlib
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import trio

from tests.host.fake_function import FakeFunction
from tests.host.fake_kernel import FakeKernel
from tests.host.tree import Machine
from tests.plugins_synthetic.device import Shape, SyntheticDevice
from tests.trio_thread import TrioThread
from vfu_server.errors import DeviceGoneError
from vfu_server.host.kernel import KernelHost, open_bdf
from vfu_server.session import Session, SessionOptions
from vfu_server.session_peers import Peers
from vfu_server.testing import Client

PAGE = mmap.PAGESIZE
WAYS = ("group", "cdev")
BDF = "0000:00:04.0"
OTHER = "0000:00:05.0"


class Plugin(SyntheticDevice):
    """The synthetic device, whose function is really reset."""

    async def reset(self) -> None:
        await super().reset()
        await self.host.reset()


class Served:
    """One function."""

    def __init__(self, bdf: str, function: FakeFunction) -> None:
        self.bdf = bdf
        self.function = function
        self.host: KernelHost
        self.plugin: Plugin
        self.session: Session
        self.send: trio.MemorySendChannel[int]
        self.lost: DeviceGoneError | None = None
        """What its session ended with."""
        self.ended = threading.Event()


class Rig(TrioThread):
    """A kernel and what is served of it. `shape` of the plugin's device, `options` of the sessions."""

    def __init__(
        self, kernel: FakeKernel, served: list[Served], shape: Shape, options: SessionOptions, plugin: type[Plugin]
    ) -> None:
        super().__init__("sessions")
        self.kernel = kernel
        self.served = {each.bdf: each for each in served}
        self._shape = shape
        self._options = options
        self._plugin = plugin
        self.start()

    # the first one, which most tests mean

    @property
    def first(self) -> Served:
        return next(iter(self.served.values()))

    @property
    def function(self) -> FakeFunction:
        return self.first.function

    @property
    def session(self) -> Session:
        return self.first.session

    @property
    def space(self):
        """The IOMMU's address space in which the first function's DMA goes."""
        return self.kernel.space_of(self.function)

    # its thread

    async def _serve(self) -> None:
        peers = Peers()
        with self._scope:
            async with trio.open_nursery() as nursery:
                for served in self.served.values():
                    await nursery.start(self._serve_one, served, peers)
                self._serving()

    async def _serve_one(self, served: Served, peers: Peers, *, task_status=trio.TASK_STATUS_IGNORED) -> None:
        served.host = await open_bdf(served.bdf, kernel=self.kernel.kernel)
        served.plugin = self._plugin(served.host, self._shape)
        served.session = Session(
            name=served.bdf,
            host=served.host,
            device=served.plugin,
            plugin_name="synthetic",
            plugin_version="1",
            options=self._options,
            peers=peers,
        )
        served.send, receive = trio.open_memory_channel[int](4)
        task_status.started()
        try:
            await served.session.run(receive.receive)
        except* DeviceGoneError as group:
            served.lost = group.exceptions[0]
        finally:
            with trio.CancelScope(shield=True):
                await served.session.shutdown()
                await served.host.aclose()
            served.ended.set()

    # clients

    def plug(self, bdf: str = "") -> socket.socket:
        """A connection that has said nothing."""
        ours, theirs = socket.socketpair()
        self.on_trio((self.served[bdf] if bdf else self.first).send.send_nowait, theirs.detach())
        return ours

    def connect(self, bdf: str = "", *, timeout: float = 5.0) -> Client:
        """A client that has negotiated; an earlier one must have been closed, and is waited for."""
        client = Client(self.plug(bdf), timeout=timeout)
        client.negotiate()
        return client


@contextlib.contextmanager
def rig(
    folder: Path,
    way: str = "cdev",
    *,
    bdfs: tuple[str, ...] = (BDF,),
    prepare=lambda kernel: None,
    plugin: type[Plugin] = Plugin,
    options: SessionOptions | None = None,
    **shape: float,
) -> Iterator[Rig]:
    """Functions at `bdfs`, opened `way`, each in a group of its own. `prepare` changes the kernel before they are."""
    machine = Machine(folder / "root")
    functions = [FakeFunction(bdf, group=7 + n) for n, bdf in enumerate(bdfs)]
    for n, function in enumerate(functions):
        machine.function(function.bdf, cdev=f"vfio{n}", group=function.group)
        machine.group_nodes(function.group)
        if way == "cdev":
            machine.cdev_nodes(f"vfio{n}")
    kernel = FakeKernel(machine.root, *functions)
    if way == "cdev":
        kernel.cdevs = {f"vfio{n}": function for n, function in enumerate(functions)}
    prepare(kernel)
    made = None
    try:
        served = [Served(function.bdf, function) for function in functions]
        made = Rig(kernel, served, Shape(**shape), options or SessionOptions(), plugin)
        yield made
        assert [each.plugin.broken for each in served] == [[]] * len(served)
    finally:
        if made is not None:
            made.close()
        kernel.close()


def until(holds, what: object = "", seconds: float = 5.0) -> None:
    """Wait for what gives no sign: what the server does after its reply, or logs."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        select.select([], [], [], 0.002)


@contextlib.contextmanager
def memory(size: int) -> Iterator[int]:
    """A memfd of zeroes."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)
