"""The PCI function around a model: config space, BARs, interrupts, time and DMA, under one lock.

It answers the client's trapped accesses and is the model's bus. It must not know sockets or trio.
"""

import threading
from collections.abc import Callable, Sequence

from vfu_server import uapi
from vfu_server.errors import PluginError
from vfu_server.host_device import IrqInfo, RegionInfo
from vfu_server.irq import IrqState
from vfu_server.libvfio_user.door import LocalMemory
from vfu_server.model import BusError, Model
from vfu_server.model_server.access_log import AccessLog
from vfu_server.model_server.clock import Alarm, Clock
from vfu_server.model_server.memory import ClientMemory
from vfu_server.pciconfig import Msix
from vfu_server.policy import WIDTH_ANY, WIDTHS_REGISTER, Answer, Answers, Policy, Rule
from vfu_server.uapi import IrqIndex, RegionIndex


class Function:
    """One model, plugged in. Methods that take the lock say so; those of the bus are called under it.

    BARs are decoded whatever COMMAND says, as the client has its own idea of it; bus mastering does gate DMA and
    messages. The MSI-X table and its pending bits are the client's: reads of the table give all ones and writes are
    dropped, as vfio-pci has it.
    """

    def __init__(
        self,
        model: Model,
        scale: float,
        failed: Callable[[BaseException], None],
        lock: threading.Condition | None = None,
    ) -> None:
        """`lock`: one that functions of one piece of hardware share; without it, one of its own."""
        _check(model)
        self.model = model
        self.accesses = AccessLog()
        self.lock = threading.Condition(threading.Lock()) if lock is None else lock
        self.memory = ClientMemory(LocalMemory(), self.lock)
        self._config = model.config
        self._irq = IrqState(
            intx=model.interrupts.intx,
            msi=model.interrupts.msi,
            msix=model.interrupts.msix,
            express=model.config.is_express,
        )
        self._clock = Clock(self.lock, scale, failed)
        model.config.on_function_reset = self._reset_function
        model.plug(self)

    # declarations

    @property
    def regions(self) -> Sequence[RegionInfo]:
        """All nine regions."""
        flags = uapi.REGION_INFO_FLAG_READ | uapi.REGION_INFO_FLAG_WRITE
        sizes = {RegionIndex.CONFIG: self._config.size, **{index: bar.size for index, bar in self.model.bars.items()}}
        return [RegionInfo(i, sizes.get(i, 0), flags if i in sizes else 0) for i in range(uapi.NUM_REGIONS)]

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        """All five interrupt indexes."""
        return self._irq.infos

    @property
    def policy(self) -> Policy:
        """Everything comes here."""
        trap = Answers.always(Answer.TRAP)
        return Policy(
            [
                Rule(r.index, 0, r.size, trap, trap, f"region {r.index}", widths=WIDTHS_REGISTER | WIDTH_ANY)
                for r in self.regions
                if r.size
            ]
        )

    # life

    def start(self) -> None:
        """Let the model's time begin."""
        self._clock.start()

    def stop(self) -> None:
        """Time stands still from now on. Waits for a callback that runs; end the connection first."""
        self._clock.stop()

    def close(self) -> None:
        """Give the client's memory and eventfds back. Nothing may use the door any more."""
        with self.lock:
            self._irq.release()
        self.memory.door.close()

    # the client's side, taking the lock: accesses in the pump's thread

    def trap_read(self, region: int, offset: int, width: int) -> int:
        """A read of 1, 2, 4 or 8 bytes. An unaligned one of a BAR reaches the model in parts."""
        if offset % width and region != RegionIndex.CONFIG:
            return int.from_bytes(self.trap_read_block(region, offset, width), "little")
        with self.lock:
            value = self._read(region, offset, width)
            self.accesses.note(False, region, offset, width, value)
            return value

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        """A write of 1, 2, 4 or 8 bytes, as `trap_read`."""
        if offset % width and region != RegionIndex.CONFIG:
            self.trap_write_block(region, offset, value.to_bytes(width, "little"))
            return
        with self.lock:
            self.accesses.note(True, region, offset, width, value)
            self._write(region, offset, width, value)

    def trap_read_block(self, region: int, offset: int, length: int) -> bytes:
        """A read of any length: config space at once, a BAR in naturally aligned accesses as vfio-pci splits them."""
        if region == RegionIndex.CONFIG:
            with self.lock:
                data = self._config.read(offset, length)
                self.accesses.note(False, region, offset, length, 0)
                return data
        return b"".join(self.trap_read(region, at, w).to_bytes(w, "little") for at, w in aligned_parts(offset, length))

    def trap_write_block(self, region: int, offset: int, data: bytes) -> None:
        """A write of any length, as `trap_read_block`."""
        if region == RegionIndex.CONFIG:
            with self.lock:
                self.accesses.note(True, region, offset, len(data), 0)
                self._write_config(offset, data)
            return
        for at, width in aligned_parts(offset, len(data)):
            value = int.from_bytes(data[at - offset : at - offset + width], "little")
            self.trap_write(region, at, width, value)

    # the client's side, taking the lock: messages in trio's thread

    def set_irqs(self, payload: bytes, fds: Sequence[int]) -> None:
        """SET_IRQS. ClientError with the kernel's errno; the fds are taken over in any case."""
        with self.lock:
            before = self._irq.messages_enabled
            try:
                self._irq.handle(payload, fds)
            finally:
                if self._irq.messages_enabled and not before:
                    self.intx(False)

    def reset(self) -> bool:
        """DEVICE_RESET; False if the device has none."""
        with self.lock:
            if self.model.can_reset:
                self._reset_function()
            return self.model.can_reset

    def bus_reset(self) -> None:
        """The client has gone: its maps and eventfds with it, and what a machine reset resets of any device."""
        with self.lock:
            self.memory.drop()
            self._irq.release()
            self._reset_config()
            self.model.bus_reset()

    @property
    def resample_fd(self) -> int:
        """As `IrqState.resample_fd`."""
        return self._irq.resample_fd

    def resample(self) -> None:
        """As `IrqState.resample`."""
        with self.lock:
            self._irq.resample()

    def state(self) -> dict[str, object]:
        """What there is to know, for the control socket."""
        with self.lock:
            mode = self._irq.mode
            return {
                "registers": dict(self.model.state()),
                "config": self._config.read(0, self._config.size).hex(),
                "irq_mode": None if mode is None else mode.name,
                "intx": self._irq.level,
                "dma_maps": self.memory.door.numbers().dma_maps,
            }

    def order_fault(self, name: str, times: int) -> None:
        """Arm a fault of the model."""
        with self.lock:
            self.model.faults.armed[name] = times

    # the model's side: the bus, under the lock

    def dma_read(self, iova: int, length: int) -> bytes:
        """See `model.Bus`."""
        self._check_master()
        return self.memory.read(iova, length)

    def dma_write(self, iova: int, data: bytes) -> None:
        """See `model.Bus`."""
        self._check_master()
        self.memory.write(iova, data)

    def message(self, vector: int) -> None:
        """See `model.Bus`."""
        if self._config.bus_master:
            self._irq.message(vector)

    def intx(self, level: bool) -> None:
        """See `model.Bus`."""
        self._irq.intx(level)
        self._config.set_interrupt_status(level)

    @property
    def messages_enabled(self) -> bool:
        """See `model.Bus`. What counts is SET_IRQS, as under vfio-pci; enable bits of config space are the client's."""
        return self._irq.messages_enabled

    @property
    def msix_enabled(self) -> bool:
        """See `model.Bus`."""
        return self._irq.mode is IrqIndex.MSIX

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        """See `model.Bus`."""
        return self._clock.call_later(seconds, callback)

    def now(self) -> float:
        """See `model.Bus`."""
        return self._clock.now()

    # inside, under the lock

    def _read(self, region: int, offset: int, width: int) -> int:
        if region == RegionIndex.CONFIG:
            return self._config.get(offset, width)
        if (kind := self._msix_part(region, offset)) is not None:
            return (1 << 8 * width) - 1 if kind == "table" else 0
        return self.model.read(region, offset, width)

    def _write(self, region: int, offset: int, width: int, value: int) -> None:
        if region == RegionIndex.CONFIG:
            self._write_config(offset, value.to_bytes(width, "little"))
        elif self._msix_part(region, offset) is None:
            self.model.write(region, offset, width, value)

    def _write_config(self, offset: int, data: bytes) -> None:
        before = self._config.msi_enabled or self._config.msix_enabled
        self._config.write(offset, data)
        self._irq.set_intx_disabled(self._config.intx_disabled)
        if not before and (self._config.msi_enabled or self._config.msix_enabled):
            self.intx(False)

    def _msix_part(self, region: int, offset: int) -> str | None:
        msix: Msix | None = self._config.msix
        if msix is None:
            return None
        if region == msix.table_bar and 0 <= offset - msix.table_offset < msix.table_size:
            return "table"
        if region == msix.pba_bar and 0 <= offset - msix.pba_offset < msix.pba_size:
            return "pba"
        return None

    def _reset_function(self) -> None:
        self._reset_config()
        self.model.reset()

    def _reset_config(self) -> None:
        self.intx(False)
        self._config.reset()
        self._irq.set_intx_disabled(False)

    def _check_master(self) -> None:
        if not self._config.bus_master:
            raise BusError("bus mastering is off")


def aligned_parts(offset: int, length: int) -> list[tuple[int, int]]:
    """`(offset, width)` of the naturally aligned accesses that make up a range."""
    parts = []
    while length:
        width = next(w for w in (8, 4, 2, 1) if offset % w == 0 and w <= length)
        parts.append((offset, width))
        offset, length = offset + width, length - width
    return parts


def _check(model: Model) -> None:
    """What a model says twice must be equal."""
    config, irqs = model.config, model.interrupts
    told = (
        {index: bar.size for index, bar in model.bars.items()},
        irqs.intx,
        irqs.msi,
        irqs.msix,
    )
    shown = (
        config.bar_sizes,
        config.interrupt_pin != 0,
        0 if config.msi is None else config.msi.vectors,
        0 if config.msix is None else config.msix.vectors,
    )
    if told != shown:
        raise PluginError(f"{type(model).__name__} declares {told}, its config space shows {shown}")
