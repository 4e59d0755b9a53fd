"""A model made from register tables (`RegisterModel`): the tables say what plain registers do, methods say what acts.

The same `Block` that a plugin's policy and save are made of. It knows accesses, values and resets; it must not know
sockets or clients.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from vfu_server import uapi
from vfu_server.errors import PluginError
from vfu_server.model import Bar, Interrupts, Model
from vfu_server.pciconfig import PciConfig
from vfu_server.regmap import READABLE, Access, Block, Register

_ELEMENT = re.compile(r"(\w+)\[(\d+)\]\.(\w+)")
MSI_CAPABILITY = 0x40


class RegisterModel(Model):
    """A PCI function whose BARs are blocks of registers.

    A register is plain memory as far as its `Access` says: RO keeps its value, RW takes what is written, W1C loses the
    ones that are written, RC is 0 after a read, WO and RSVD keep nothing and read as all ones, as a gap does. What does
    more has a method, `read_NAME()` or `write_NAME(value)` (for a register of an array `read_ARRAY_NAME(index)`,
    `write_ARRAY_NAME(index, value)`), which is called instead. A method of that form for a register that is not there
    is a PluginError: it would never be called and nobody would know.

    `self["status"]` is a register's value. An access of another width than the register's, or within it, gives or takes
    those bytes of it; one that touches several registers reads as all ones and writes nothing.
    """

    can_reset = True

    def __init__(
        self,
        blocks: Mapping[int, Block],
        *,
        vendor: int,
        device: int,
        class_code: int = 0xFF0000,
        intx: bool = False,
        msi: int = 0,
        config: PciConfig | None = None,
    ) -> None:
        """`blocks` by BAR; a BAR is the next power of two, 4 KiB at least. `config`: a config space of the model's own,
        whose BARs, interrupt pin and vectors are the model's then (`intx` and `msi` say nothing); else one is made.
        """
        super().__init__()
        self.blocks = dict(blocks)
        self.bars = {index: Bar(max(4096, 1 << (block.size - 1).bit_length())) for index, block in blocks.items()}
        self.interrupts = Interrupts(intx=intx, msi=msi)
        if config is None:
            config = self._config(vendor, device, class_code)
        else:
            self._take(config)
        self.config = config
        self._readers: dict[str, Callable[[], int]] = {}
        self._writers: dict[str, Callable[[int], None]] = {}
        self._find_methods()
        self._values: dict[str, int] = {}
        self.clear()

    def _config(self, vendor: int, device: int, class_code: int) -> PciConfig:
        pin = 1 if self.interrupts.intx else 0
        config = PciConfig(vendor=vendor, device=device, class_code=class_code, interrupt_pin=pin)
        for index, bar in self.bars.items():
            config.add_bar(index, bar.size)
        if self.interrupts.msi:
            config.add_msi(MSI_CAPABILITY, self.interrupts.msi)
        return config

    def _take(self, config: PciConfig) -> None:
        """What `config` declares is the model's; its blocks have to fit."""
        self.bars = {
            index: Bar(size, io=bool(config.get(uapi.PCI_BASE_ADDRESS_0 + 4 * index, 4) & 1))
            for index, size in config.bar_sizes.items()
        }
        for index, block in self.blocks.items():
            if index not in self.bars or block.size > self.bars[index].size:
                raise PluginError(f"the block {block.name} does not fit into BAR {index} of the config space")
        self.interrupts = Interrupts(
            intx=bool(config.interrupt_pin),
            msi=config.msi.vectors if config.msi else 0,
            msix=config.msix.vectors if config.msix else 0,
        )

    def _find_methods(self) -> None:
        names: set[str] = set()
        for block in self.blocks.values():
            for register in block:
                element = _ELEMENT.fullmatch(register.name)
                name = f"{element[1]}_{element[3]}" if element else register.name
                index = (int(element[2]),) if element else ()
                for kind, found in (("read", self._readers), ("write", self._writers)):
                    names.add(f"{kind}_{name}")
                    method: Callable[..., Any] | None = getattr(self, f"{kind}_{name}", None)
                    if method is not None:
                        found[register.name] = _bound(method, *index)
        for name in dir(self):
            if name.startswith(("read_", "write_")) and name not in names:
                raise PluginError(f"{type(self).__name__}.{name}: no register of its blocks has that name")

    def clear(self) -> None:
        """All registers as their tables say, 0 where they say nothing."""
        self._values = {r.name: r.reset or 0 for block in self.blocks.values() for r in block}

    # registers as the model sees them

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __setitem__(self, name: str, value: int) -> None:
        self._values[name] = value & self._register(name).mask

    def _register(self, name: str) -> Register:
        for block in self.blocks.values():
            if name in block:
                return block[name]
        raise PluginError(f"{type(self).__name__} has no register {name!r}")

    # what a model does

    def interrupt(self, vector: int = 0) -> None:
        """Send message `vector`, or raise INTx where messages are off; INTx is lowered by `self.bus.intx(False)`."""
        if self.bus.messages_enabled:
            self.bus.message(vector)
        elif self.interrupts.intx:
            self.bus.intx(True)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back after `seconds` of the model's time: where DMA and whatever takes time belongs."""
        self.bus.call_later(seconds, callback)

    # accesses, see Model

    def read(self, region: int, offset: int, width: int) -> int:
        ones = (1 << 8 * width) - 1
        register = self.blocks[region].at(offset)
        if register is None or offset + width > register.end:
            return ones
        if (reader := self._readers.get(register.name)) is not None:
            value = reader()
        elif register.access in READABLE or register.access is Access.RC:
            value = self._values[register.name]
            if register.access is Access.RC:
                self._values[register.name] = 0
        else:
            value = register.mask
        return value >> 8 * (offset - register.offset) & ones

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        register = self.blocks[region].at(offset)
        if register is None or offset + width > register.end:
            return
        shift = 8 * (offset - register.offset)
        part = (1 << 8 * width) - 1
        given = (value & part) << shift
        if (writer := self._writers.get(register.name)) is not None:
            kept = self._values[register.name] & ~(part << shift) if register.access is Access.RW else 0
            writer(kept | given)
        elif register.access is Access.RW:
            self._values[register.name] = self._values[register.name] & ~(part << shift) | given
        elif register.access is Access.W1C:
            self._values[register.name] &= ~given

    def reset(self) -> None:
        """All registers as their tables say. A model with more state adds its own."""
        self.clear()

    def state(self) -> Mapping[str, int]:
        return dict(self._values)


def _bound(method: Callable[..., Any], *index: int) -> Callable[..., Any]:
    return lambda *value: method(*index, *value)
