"""A function with a fake driver behind the real door and a whole Session, its clients over socketpairs.

All but the kernel is the product's: the plugin vfio is asked for the device. It must not know what is tested.
"""

import contextlib
import os
import socket
from collections.abc import Iterator

import trio

import plugins.vfio
from tests.host.fake_function import FakeFunction
from tests.host.fake_kernel import FakeKernel
from tests.host.fake_migration import FakeMigration
from tests.host.tree import Machine
from tests.trio_thread import TrioThread
from vfu_server.host.kernel import KernelHost, open_bdf
from vfu_server.session import Session, SessionOptions
from vfu_server.testing import Client
from vfu_server.uapi import MigState

BDF = "0000:00:04.0"


class Function(TrioThread):
    """One served function in a machine of its own below `root`; `driver` migrates it, or None."""

    def __init__(self, root, flags: int, state: bytes = b"", *, cdev: bool = True, migrates: bool = True) -> None:
        super().__init__("session")
        machine = Machine(root)
        machine.function(BDF, driver="fake_vfio_pci", cdev="vfio0")
        machine.group_nodes()
        self.function = FakeFunction(BDF)
        self.kernel = FakeKernel(root, self.function)
        if cdev:
            machine.cdev_nodes()
            self.kernel.cdevs["vfio0"] = self.function
        self.driver = FakeMigration(self.kernel, self.function, flags, state) if migrates else None
        self.host: KernelHost
        self.session: Session
        self.start()

    async def _serve(self) -> None:
        self.host = await open_bdf(BDF, kernel=self.kernel.kernel)
        device = plugins.vfio.vfu_server_probe(self.host, {})
        self.device = device
        self.session = Session(
            name=BDF, host=self.host, device=device, plugin_name="vfio", plugin_version="1", options=SessionOptions()
        )
        self._send, receive = trio.open_memory_channel[int](4)
        self._serving()
        try:
            with self._scope:
                await self.session.run(receive.receive)
        finally:
            with trio.CancelScope(shield=True):
                await self.session.shutdown()
                await device.aclose()
                await self.host.aclose()

    def connect(self, *, timeout: float = 6.0) -> Client:
        """A client that has negotiated; an earlier one must have been closed, and is waited for."""
        ours, theirs = socket.socketpair()
        self.on_trio(self._send.send_nowait, theirs.detach())
        client = Client(ours, timeout=timeout)
        client.negotiate()
        return client

    def plain(self, state: MigState) -> int:
        """What a program does that has the device itself: SET MIG_DEVICE_STATE; the data fd, or -1."""
        return self.driver._set_state(state)

    def close(self) -> None:
        super().close()
        self.kernel.close()


@contextlib.contextmanager
def served(root, flags: int, state: bytes = b"", **kinds: bool) -> Iterator[Function]:
    """A served function; at the end nothing of the kernel's may be left open."""
    function = Function(root, flags, state, **kinds)
    try:
        yield function
    finally:
        function.close()


def leftovers(function: Function) -> list[str]:
    """Names of the data fds that are open."""
    return [os.readlink(f"/proc/self/fd/{fd}") for fd, file in function.kernel._files.items() if file.kind == "state"]
