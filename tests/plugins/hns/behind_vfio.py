"""The plugin's model as a function of a kernel: a VF behind the ioctl door, DMA through an IOMMU that keeps dirty bits.

The kernel is the fake one at open(2), ioctl(2) and pread(2); door, session, plugin and log are the product's. The model
has a clock and a thread of its own, as hardware that works while its driver looks elsewhere. Knows no test.
"""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from plugins.hns.device import HnsDevice
from plugins.hns.models.accelerator import functions
from plugins.hns.models.generation import Order
from plugins.hns.probe import probe
from plugins.hns.registers import MAILBOX, MAILBOX_SIZE, QM_REGION, VENDOR, ZIP
from tests.host.fake_function import CONFIG, OFFSETS, FakeFunction
from tests.host.fake_kernel import PAGE, FakeKernel, Mapping
from tests.host.tree import Machine
from tests.plugins.hns.served import SECONDS
from tests.trio_thread import TrioThread
from vfu_server.host.ioctl import HW_CAP_DIRTY_TRACKING
from vfu_server.host.kernel import open_bdf
from vfu_server.model import BusError, Model
from vfu_server.model_server.clock import Alarm, Clock
from vfu_server.session import Session, SessionOptions
from vfu_server.testing import Client
from vfu_server.uapi import DMA_FLAG_READ, DMA_FLAG_WRITE, PCI_COMMAND, PCI_COMMAND_MASTER, IrqIndex

BDF, PF = "0000:75:00.1", "0000:75:00.0"
VECTORS = 4


class ConfigBytes:
    """Config space as the fake kernel touches it: a byte at a time."""

    def __init__(self, model: Model) -> None:
        self._config = model.config

    def __getitem__(self, at: int) -> int:
        return self._config.read(at, 1)[0]

    def __setitem__(self, at: int, value: int) -> None:
        self._config.write(at, bytes([value]))


class ModelFunction(FakeFunction):
    """The function whose hardware is `model`; also that model's bus, whose methods are called under `lock`.

    A page of its file is the mailbox's: a driver stores there through a mapping, which no call tells of, so what was
    stored is passed on before the next access, as two halves in order.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(BDF)
        self.model = model
        self.lock = threading.Condition()
        self.failed: list[BaseException] = []
        self.clock = Clock(self.lock, 1.0, self.failed.append)
        self.space: Callable[[], Any]
        self.file = -1
        self.sizes = [0, 0, model.bars[QM_REGION].size, 0, 0, 0, 0, model.config.size, 0]
        self.flags = [7 if size else 0 for size in self.sizes]
        self.irq_counts = [0, VECTORS, 0, 0, 0]
        self.memory[CONFIG] = ConfigBytes(model)
        model.plug(self)
        self.clock.start()

    # the kernel's side

    def pread(self, count: int, offset: int) -> bytes:
        index, at = self._place(offset)
        self._check_memory(index)
        with self.lock:
            if index == CONFIG:
                return self.model.config.read(at, count)
            self._take_wide()
            return self.model.read(index, at, count).to_bytes(count, "little")

    def pwrite(self, data: bytes, offset: int) -> int:
        index, at = self._place(offset)
        self._check_memory(index)
        with self.lock:
            if index == CONFIG:
                self.model.config.write(at, data)
            else:
                self._take_wide()
                self.model.write(index, at, len(data), int.from_bytes(data, "little"))
        return len(data)

    def _take_wide(self) -> None:
        place = OFFSETS[QM_REGION] + MAILBOX
        stored = os.pread(self.file, MAILBOX_SIZE, place)
        if any(stored):
            os.pwrite(self.file, bytes(MAILBOX_SIZE), place)
            for at in (0, 8):
                self.model.write(QM_REGION, MAILBOX + at, 8, int.from_bytes(stored[at : at + 8], "little"))

    def _check_memory(self, index: int) -> None:
        """Of a virtual function it is always on."""

    def reset(self) -> int:
        with self.lock:
            self.model.config.reset()
            self.model.reset()
        return super().reset()

    def close(self) -> None:
        self.clock.stop()
        os.close(self.file)
        assert not self.failed, self.failed

    # the model's bus

    def dma_read(self, iova: int, length: int) -> bytes:
        return b"".join(m.read(at, count) for m, at, count in self._pieces(iova, length, DMA_FLAG_READ))

    def dma_write(self, iova: int, data: bytes) -> None:
        done = 0
        for mapping, at, count in self._pieces(iova, len(data), DMA_FLAG_WRITE):
            mapping.write(at, data[done : done + count])
            done += count
        if (space := self.space()).tracking:
            space.dirty |= set(range(iova // PAGE * PAGE, iova + len(data), PAGE))

    def _pieces(self, iova: int, length: int, prot: int) -> list[tuple[Mapping, int, int]]:
        if not self.model.config.get(PCI_COMMAND, 2) & PCI_COMMAND_MASTER:
            raise BusError("bus mastering is off")
        found, at, end = [], iova, iova + length
        while at < end:
            mapping = self.space().find(at)
            if mapping is None or not mapping.prot & prot:
                raise BusError(f"the IOMMU has nothing at {at:#x}")
            count = min(end, mapping.iova + mapping.size) - at
            found.append((mapping, at - mapping.iova, count))
            at += count
        return found

    def message(self, vector: int) -> None:
        if (IrqIndex.MSI, vector) in self.triggers:
            self.signal(IrqIndex.MSI, vector)

    def intx(self, level: bool) -> None:
        assert not level, "it has no pin"

    @property
    def messages_enabled(self) -> bool:
        return self.model.config.msi_enabled

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        return self.clock.call_later(seconds, callback)

    def now(self) -> float:
        return self.clock.now()


class LoggingKernel(FakeKernel):
    """A kernel whose IOMMU keeps dirty bits, and that waits with them while the hardware is at something."""

    def __init__(self, root: Path, function: ModelFunction) -> None:
        super().__init__(root, function)
        self.hw_capabilities = HW_CAP_DIRTY_TRACKING
        self._function = function
        function.space = lambda: self.space_of(function)

    def _new_file(self, kind: str, what: Any = None) -> int:
        fd = super()._new_file(kind, what)
        if what is self._function:
            os.ftruncate(fd, self._function.sizes[QM_REGION])
            self._function.file = os.dup(fd)
        return fd

    def _dispatch(self, fd: int, request: int, argument: Any) -> int:
        with self._function.lock:
            return super()._dispatch(fd, request, argument)


class KernelSide(TrioThread):
    """One ZIP VF under vfio-pci, opened by its device node, with this plugin; to one client after another."""

    def __init__(self, root: Path) -> None:
        super().__init__("kernel side")
        machine = Machine(root)
        machine.function(PF, driver="hisi_zip", group=6, ids=(VENDOR, ZIP.pf_id))
        machine.function(BDF, cdev="vfio0", ids=(VENDOR, ZIP.vf_id), parent=PF)
        machine.group_nodes()
        machine.cdev_nodes()
        models = functions(Order(ZIP, isolation=False))
        models["pf"].plug(_Still())
        self.function = ModelFunction(models["vf0"])
        self.kernel = LoggingKernel(root, self.function)
        self.kernel.cdevs["vfio0"] = self.function
        self.start()

    async def _serve(self) -> None:
        host = await open_bdf(BDF, kernel=self.kernel.kernel)
        device = probe(host, {"pf": "none"})
        assert isinstance(device, HnsDevice)
        try:
            await device.open(None)  # type: ignore[arg-type] - nobody is looked for
            session = Session(
                name=BDF, host=host, device=device, plugin_name="hns", plugin_version="1", options=SessionOptions()
            )
            self._send, receive = trio.open_memory_channel[int](4)
            self._serving()
            try:
                with self._scope:
                    await session.run(receive.receive)
            finally:
                with trio.CancelScope(shield=True):
                    await session.shutdown()
        finally:
            with trio.CancelScope(shield=True):
                await device.aclose()
                await host.aclose()

    def client(self) -> Client:
        """A client that has not negotiated yet."""
        ours, theirs = socket.socketpair()
        self.on_trio(self._send.send_nowait, theirs.detach())
        return Client(ours, timeout=SECONDS)

    def close(self) -> None:
        super().close()
        self.function.close()
        self.kernel.close()


class _Still:
    """The bus of a PF that nobody talks to."""

    messages_enabled = False

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        raise AssertionError("the PF does something")
