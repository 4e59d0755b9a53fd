"""The device's registers by name.

Every access to the hardware by this plugin goes through here. It must not know what the registers are for.
"""

from collections.abc import Iterable, Mapping

from vfu_server.errors import PluginError
from vfu_server.host_device import HostDevice
from vfu_server.regmap import READABLE, Block, Register


class Port:
    """Registers of all BARs of one device. Names are those of the blocks and unique over all BARs."""

    def __init__(self, host: HostDevice, blocks: Mapping[int, Block]) -> None:
        self.host = host
        self._places = {register.name: (bar, register) for bar, block in blocks.items() for register in block}

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def place(self, name: str) -> tuple[int, Register]:
        """BAR and register. PluginError if there is none of that name."""
        try:
            return self._places[name]
        except KeyError:
            raise PluginError(f"{self.host.name}: there is no register {name!r}") from None

    def read(self, name: str) -> int:
        """The register's value, in one access of its width."""
        bar, register = self.place(name)
        return self.host.read(bar, register.offset, register.width)

    def write(self, name: str, value: int) -> None:
        """Write the whole register in one access; `value` is cut to its width."""
        bar, register = self.place(name)
        self.host.write(bar, register.offset, register.width, value & register.mask)

    def write_halves(self, name: str, value: int) -> None:
        """Write a register in two halves, the low one first, for hardware that does not take it in one access."""
        bar, register = self.place(name)
        half = register.width // 2
        mask = (1 << (8 * half)) - 1
        self.host.write(bar, register.offset, half, value & mask)
        self.host.write(bar, register.offset + half, half, value >> (8 * half) & mask)

    def field(self, path: str) -> int:
        """The number in a field, as `register.field`."""
        name, _, field = path.rpartition(".")
        return self.place(name)[1].field(field).get(self.read(name))

    def snapshot(self, names: Iterable[str]) -> dict[str, int]:
        """The registers' values, in the order of `names`."""
        return {name: self.read(name) for name in names}

    def show(self, names: Iterable[str]) -> str:
        """What the registers read, for a message. What cannot be read is left out."""
        found = [self.place(name)[1] for name in names]
        return ", ".join(r.decode(self.read(r.name)) for r in found if r.access in READABLE)
