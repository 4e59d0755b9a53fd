"""Intel's I/OAT (CBDMA) engine, version 3.2, as a model: one or two channels that copy memory by chains of descriptors.

Registers are those of the kernel's driver and headers, and of Intel's datasheets (Xeon E7 v2, volume 2): there a
function has one channel, BAR0 of 16 KiB with the MSI-X table at 8 KiB and the pending bits at 12 KiB. It must not know
the plugin that saves and restores it.

Three reads act, as on hardware: INTRCTRL's clears its master enable (so the driver's handler writes back what it read),
ATTNSTATUS's clears the attention bits, and CHANCTRL's sets its in-use bit. Strict as hardware (model): a register wants
its own width, the 64-bit ones also halves; other accesses read all ones and write nothing. CHANCMP takes halves only.

Faults to order: `halt` (a channel halts instead of doing the next descriptor), `suspend-stuck` (a suspend is not
taken), `lost-completion` (a descriptor ends without its completion write and interrupt).
"""

import functools
from collections.abc import Mapping

from plugins.generic_dmaq.models.ioat_channel import XFERCAP, Channel
from plugins.generic_dmaq.registers import load_blocks
from vfu_server.model import Bar, Bus, Interrupts, Model
from vfu_server.pciconfig import PciConfig
from vfu_server.regmap import READABLE, Register

BAR_SIZE = 0x4000
MSIX_TABLE = 0x2000
MSIX_PBA = 0x3000
VERSION = 0x32
CAPABILITIES = 0x1  # page break, the one that a plain copy can ignore

CONFIG_UNCORRECTABLE = 0x148
CONFIG_CHANERR = 0x180
CONFIG_CHANERR_MASK = 0x184

MASTER_ENABLE, INT_STATUS, INT_BOTH, VECTOR_PER_CHANNEL = 1, 2, 4, 8


class IoatModel(Model):
    """The function 8086:2f20 with `channels` channels and as many MSI-X vectors. FLR and bus reset reset everything."""

    can_reset = True

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.bars = {0: Bar(BAR_SIZE, wide=True)}
        self.interrupts = Interrupts(intx=True, msix=channels)
        self.config = _config_space(channels)
        self._channels = [
            Channel(self._get_bus, self.faults, functools.partial(self._interrupt, index), self._report_error)
            for index in range(channels)
        ]
        self._block = load_blocks("ioat", {"channel": channels})[0]
        self._places = {r.offset: _place(r) for r in self._block}
        self._clear()

    def read(self, region: int, offset: int, width: int) -> int:
        """A read of a whole register, or of half a 64-bit one."""
        register = self._register(offset, width)
        ones = (1 << 8 * width) - 1
        if register is None or register.access not in READABLE:
            return ones
        channel, name = self._places[register.offset]
        value = self._read_global(name) if channel is None else self._channels[channel].read(name)
        return value >> 8 * (offset - register.offset) & ones

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """A write of a whole register, or of half a 64-bit one."""
        register = self._register(offset, width)
        if register is None:
            return
        channel, name = self._places[register.offset]
        if channel is None:
            self._write_global(name, value)
            return
        if register.width == 8:
            if width == 8 and name == "chancmp":
                return
            shift = 8 * (offset - register.offset)
            kept = self._channels[channel].peek(name) & ~(((1 << 8 * width) - 1) << shift)
            value = kept | value << shift
        self._channels[channel].write(name, value)

    def reset(self) -> None:
        """Function level reset."""
        for channel in self._channels:
            channel.reset_function()
        self._clear()

    def bus_reset(self) -> None:
        """A PCI Express function is reset with its bus."""
        self.reset()

    def state(self) -> Mapping[str, int]:
        """All registers, and each channel's count of finished descriptors, which no register shows."""
        found = {}
        for register in self._block:
            index, name = self._places[register.offset]
            found[register.name] = self._global(name) if index is None else self._channels[index].peek(name)
        finished = {f"channel[{i}].finished": channel.finished for i, channel in enumerate(self._channels)}
        return {**found, **finished}

    # registers of the whole device

    def _clear(self) -> None:
        self._genctrl = 0
        self._intrctrl = 0
        self._intrdelay = 0
        self._attention = 0
        self._asserted = False

    def _global(self, name: str) -> int:
        match name:
            case "chancnt":
                return len(self._channels)
            case "xfercap":
                return XFERCAP
            case "genctrl":
                return self._genctrl
            case "intrctrl":
                status = INT_STATUS if self._attention else 0
                return self._intrctrl | status | (INT_BOTH if self._asserted else 0)
            case "attnstatus":
                return self._attention
            case "version":
                return VERSION
            case "intrdelay":
                return self._intrdelay
            case "capabilities":
                return CAPABILITIES
            case _:
                return 0

    def _read_global(self, name: str) -> int:
        value = self._global(name)
        if name == "intrctrl":
            self._intrctrl &= ~MASTER_ENABLE
            self._drive()
        elif name == "attnstatus":
            self._attention = 0
            self._drive()
        return value

    def _write_global(self, name: str, value: int) -> None:
        match name:
            case "genctrl":
                self._genctrl = value
            case "intrctrl":
                self._intrctrl = value & (MASTER_ENABLE | VECTOR_PER_CHANNEL)
                self._drive()
            case "intrdelay":
                self._intrdelay = value & 0x3FFF

    def _register(self, offset: int, width: int) -> Register | None:
        register = self._block.at(offset)
        if register is None:
            return None
        whole = offset == register.offset and width == register.width
        half = register.width == 8 and width == 4 and offset % 4 == 0
        return register if whole or half else None

    # interrupts and errors

    def _interrupt(self, channel: int) -> None:
        if self._intrctrl & VECTOR_PER_CHANNEL:
            self.bus.message(channel)
            return
        self._attention |= 1 << channel
        self._drive()

    def _drive(self) -> None:
        """The one line of all channels: attention and master enable. Under messages its rise is vector 0."""
        level = bool(self._attention and self._intrctrl & MASTER_ENABLE)
        if not self.bus.messages_enabled:
            self.bus.intx(level)
        elif level and not self._asserted:
            self.bus.message(0)
        self._asserted = level

    def _report_error(self, bits: int) -> None:
        self.config.set(CONFIG_CHANERR, 4, self.config.get(CONFIG_CHANERR, 4) | bits)

    def _get_bus(self) -> Bus:
        return self.bus


def _config_space(channels: int) -> PciConfig:
    config = PciConfig(
        vendor=0x8086,
        device=0x2F20,
        class_code=0x088000,
        revision=0x02,
        subsystem_vendor=0x8086,
        interrupt_pin=1,
        size=4096,
    )
    config.add_bar(0, BAR_SIZE, wide=True)
    config.add_msix(0x80, channels, table=(0, MSIX_TABLE), pba=(0, MSIX_PBA))
    config.add_express(0x90)
    config.add_power_management(0xE0)
    config.add_register(CONFIG_UNCORRECTABLE, 4, write_clears=0xFFFFFFFF)
    config.add_register(CONFIG_CHANERR, 4, write_clears=0xFFFFFFFF)
    config.add_register(CONFIG_CHANERR_MASK, 4, writable=0xFFFFFFFF)
    return config


def _place(register: Register) -> tuple[int | None, str]:
    """`channel[1].chansts` -> (1, "chansts"); a register of the whole device has no channel."""
    array, _, name = register.name.rpartition(".")
    return (int(array.removeprefix("channel[").removesuffix("]")), name) if array else (None, register.name)
