"""The golden stream of the plugin vfio: a function whose driver in the kernel migrates it.

The driver is the fake one of tests/host, as its bytes are the kernel's affair; the plugin, the kernel door and, when
the stream is made, the session are the product's.
"""

import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import plugins.vfio
from tests.end_to_end.streams import Parts
from tests.golden.registry import Golden, told
from tests.host.fake_function import FakeFunction
from tests.host.fake_kernel import FakeKernel
from tests.host.fake_migration import MAGIC, P2P, PRE_COPY, STOP_COPY, FakeMigration
from tests.host.served import BDF, served
from tests.host.tree import Machine
from vfu_server.device import Device, StopKind
from vfu_server.host.kernel import open_bdf
from vfu_server.testing import save, save_early
from vfu_server.uapi import MigState

FLAGS = STOP_COPY | P2P | PRE_COPY
SIZE = 3000


def state() -> bytes:
    return bytes(n * n % 251 for n in range(SIZE))


class VfioPlace:
    """A function in a machine of its own."""

    def __init__(self, host, driver: FakeMigration) -> None:
        self.host = host
        self.driver = driver
        self.device: Device | None = None

    async def fresh(self) -> Device:
        if self.device is not None:
            await self.device.reset()
        self.driver.state[:] = bytes(SIZE)
        self.device = self.device or plugins.vfio.vfu_server_probe(self.host, {})
        if self.driver.mig_state is MigState.RUNNING:
            await self.device.stop(StopKind.P2P)
            await self.device.stop(StopKind.FULL)
        return self.device

    def written(self) -> bool:
        return bytes(self.driver.state) != bytes(SIZE)

    async def differences(self, parts: Parts) -> list[str]:
        data = b"".join(told(parts, "kernel"))
        at = len(MAGIC)
        while data[at : at + 1] == b"~":
            at += 9 + int.from_bytes(data[at + 1 : at + 9], "little")
        return [] if bytes(self.driver.state) == data[at + 9 :] else ["the driver has another state"]


@asynccontextmanager
async def place(parts: Parts):
    with tempfile.TemporaryDirectory(prefix="vfu-") as folder:
        machine = Machine(Path(folder) / "root")
        machine.function(BDF, driver="fake_vfio_pci", cdev="vfio0")
        machine.group_nodes()
        machine.cdev_nodes()
        function = FakeFunction(BDF)
        kernel = FakeKernel(machine.root, function)
        kernel.cdevs["vfio0"] = function
        driver = FakeMigration(kernel, function, FLAGS, bytes(SIZE))
        host = await open_bdf(BDF, kernel=kernel.kernel)
        try:
            made = VfioPlace(host, driver)
            yield made
            if made.device is not None:
                await made.device.aclose()
        finally:
            await host.aclose()
            kernel.close()


def make(folder: Path) -> bytes:
    with served(folder / "root", FLAGS, state()) as function:
        client = function.connect()
        client.set_mig_state(MigState.PRE_COPY)
        data = b"".join(save_early(client))
        function.driver.change(b"changed")
        while client.precopy_info().dirty_bytes:
            data += b"".join(save_early(client))
        client.set_mig_state(MigState.STOP_COPY)
        data += b"".join(save(client))
        client.close()
        return data


GOLDEN = (Golden("vfio", "kernel", 1, place, make, jumps=False),)
