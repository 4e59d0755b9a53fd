"""PCI configuration space of a software model: bytes, what a write may change of them, and what a reset restores.

It behaves as QEMU's devices do: a byte has a mask of writable bits and a mask of bits that a written 1 clears. It knows
the standard header and the capabilities that our models have, and nothing of who reads it, of interrupts or of DMA: it
only says what the enable bits are.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vfu_server import uapi
from vfu_server.errors import ClientError, PluginError

HEADER_SIZE = 0x40
NUM_BARS = 6

# COMMAND: I/O, memory, master, SERR, INTx disable. STATUS: the error bits, all cleared by a written 1.
_COMMAND_WRITABLE = 0x0507
_STATUS_W1C = 0xF900

_BAR_IO = 0x1
_BAR_64 = 0x4
_BAR_PREFETCH = 0x8

_MSI_ENABLE = 0x0001
_MSI_CAPABLE = 0x000E
_MSI_QSIZE = 0x0070
_MSI_64BIT = 0x0080
_MSI_MASKBIT = 0x0100
_MSIX_ENABLE = 0x8000
_MSIX_FUNCTION_MASK = 0x4000

_PM_STATE = 0x0003
_PM_NO_SOFT_RESET = 0x0008

_CAP_ID_VENDOR = 0x09

_EXP_SIZES = {1: 0x14, 2: 0x3C}
"""Bytes of the capability of an endpoint, by its version (PCI Express 1.1, 7.8; 2.0, 7.8)."""
_EXP_DEVCAP_FLR = 1 << 28
_EXP_DEVCAP_ROLE_BASED = 1 << 15
_EXP_DEVCTL = 8
_EXP_DEVCTL_FLR = 0x8000
_EXP_DEVCTL_WRITABLE = 0x7FFF
_EXP_DEVCTL_RESET = 0x2810  # relaxed ordering, no snoop, read requests of 512 bytes
_EXP_DEVSTA_W1C = 0x000F


@dataclass(frozen=True, slots=True)
class Msi:
    """An MSI capability: `offset` of its header, `vectors` that it can send, the layout by `wide` and `maskable`."""

    offset: int
    vectors: int
    wide: bool
    maskable: bool


@dataclass(frozen=True, slots=True)
class Msix:
    """An MSI-X capability: where the table of `vectors` entries and the pending bits are, as (BAR, offset)."""

    offset: int
    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return 16 * self.vectors

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bits, whole 64-bit words."""
        return 8 * ((self.vectors + 63) // 64)


class PciConfig:
    """Configuration space with a header of type 0 and no expansion ROM.

    `size` is 256 or 4096. `scratch`: bytes from 0x40 to 0xff that no capability owns are plain memory and survive a
    reset, as in QEMU's devices; else they read 0. Declarations raise PluginError for what cannot be meant.
    """

    def __init__(
        self,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem_vendor: int = 0,
        subsystem: int = 0,
        interrupt_pin: int = 0,
        size: int = uapi.PCI_CFG_SPACE_SIZE,
        scratch: bool = False,
    ) -> None:
        if size not in (uapi.PCI_CFG_SPACE_SIZE, uapi.PCI_CFG_SPACE_EXP_SIZE):
            raise PluginError(f"config space has 256 or 4096 bytes, not {size}")
        self.size = size
        self.msi: Msi | None = None
        self.msix: Msix | None = None
        self.bar_sizes: dict[int, int] = {}
        self.on_function_reset: Callable[[], None] | None = None
        """Called when a 1 is written to the PCIe capability's FLR bit, after the write has been done otherwise."""
        self._bars_taken: set[int] = set()
        self._express: int | None = None
        self._power: int | None = None
        self._bytes = bytearray(size)
        self._reset = bytearray(size)
        self._writable = bytearray(size)
        self._write_clears = bytearray(size)
        self._owned = bytearray(size)
        self._last_pointer = uapi.PCI_CAPABILITY_LIST
        self._owned[:HEADER_SIZE] = b"\1" * HEADER_SIZE
        if scratch:
            self._writable[HEADER_SIZE : uapi.PCI_CFG_SPACE_SIZE] = b"\xff" * (uapi.PCI_CFG_SPACE_SIZE - HEADER_SIZE)
        self._declare(uapi.PCI_VENDOR_ID, 2, vendor)
        self._declare(uapi.PCI_DEVICE_ID, 2, device)
        self._declare(uapi.PCI_COMMAND, 2, 0, writable=_COMMAND_WRITABLE)
        self._declare(uapi.PCI_STATUS, 2, 0, write_clears=_STATUS_W1C)
        self._declare(uapi.PCI_REVISION_ID, 1, revision)
        self._declare(uapi.PCI_CLASS_PROG, 3, class_code)
        self._declare(uapi.PCI_CACHE_LINE_SIZE, 1, 0, writable=0xFF)
        self._declare(uapi.PCI_SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor)
        self._declare(uapi.PCI_SUBSYSTEM_ID, 2, subsystem)
        self._declare(uapi.PCI_INTERRUPT_LINE, 1, 0, writable=0xFF)
        self._declare(uapi.PCI_INTERRUPT_PIN, 1, interrupt_pin)

    # declarations

    def add_bar(
        self, index: int, size: int, *, io: bool = False, wide: bool = False, prefetchable: bool = False
    ) -> None:
        """A base address register of `size` bytes (a power of two); `wide` (64 bit) takes the next one too."""
        needed = {index, index + 1} if wide else {index}
        least = 4 if io else 16
        if size < least or size & (size - 1) or size > 1 << (63 if wide else 31):
            raise PluginError(f"BAR{index}: {size:#x} bytes is no possible size")
        if not needed <= set(range(NUM_BARS)) or needed & self._bars_taken or (io and wide):
            raise PluginError(f"BAR{index} cannot be there")
        kind = _BAR_IO if io else (_BAR_64 if wide else 0) | (_BAR_PREFETCH if prefetchable else 0)
        width = 8 if wide else 4
        self._declare(uapi.PCI_BASE_ADDRESS_0 + 4 * index, width, kind, writable=-size & ((1 << 8 * width) - 1))
        self.bar_sizes[index] = size
        self._bars_taken |= needed

    def add_capability(
        self, offset: int, cap_id: int, body: bytes, writable: bytes = b"", write_clears: bytes = b""
    ) -> None:
        """A capability at `offset`: its header (id and link) is made here, the masks are for `body`, 0 where short."""
        size = 2 + len(body)
        if offset % 4 or offset + size > uapi.PCI_CFG_SPACE_SIZE:
            raise PluginError(f"capability {cap_id:#x} cannot be at {offset:#x}")
        self._claim(offset, size, f"capability {cap_id:#x}")
        self._declare(offset, 2, cap_id)
        self._declare(self._last_pointer, 1, offset)
        self._last_pointer = offset + 1
        for at, value in enumerate(body):
            may = writable[at] if at < len(writable) else 0
            clears = write_clears[at] if at < len(write_clears) else 0
            self._declare(offset + 2 + at, 1, value, writable=may, write_clears=clears)
        status = self.get(uapi.PCI_STATUS, 2) | uapi.PCI_STATUS_CAP_LIST
        self._declare(uapi.PCI_STATUS, 2, status, write_clears=_STATUS_W1C)

    def add_msi(self, offset: int, vectors: int, *, wide: bool = True, maskable: bool = False) -> None:
        """Message Signalled Interrupts: 1, 2, 4 ... 32 vectors."""
        if vectors not in (1, 2, 4, 8, 16, 32) or self.msi is not None:
            raise PluginError(f"an MSI capability with {vectors} vectors cannot be")
        control = (vectors.bit_length() - 1) << 1 | (_MSI_64BIT if wide else 0) | (_MSI_MASKBIT if maskable else 0)
        body = control.to_bytes(2, "little") + bytes(8 if wide else 4) + bytes(2)
        writable = (_MSI_QSIZE | _MSI_ENABLE).to_bytes(2, "little") + b"\xfc\xff\xff\xff"
        writable += (b"\xff\xff\xff\xff" if wide else b"") + b"\xff\xff"
        if maskable:
            body += bytes(2 + 8)
            writable += bytes(2) + ((1 << vectors) - 1).to_bytes(4, "little")
        self.add_capability(offset, uapi.PCI_CAP_ID_MSI, body, writable)
        self.msi = Msi(offset, vectors, wide, maskable)

    def add_msix(self, offset: int, vectors: int, *, table: tuple[int, int], pba: tuple[int, int]) -> None:
        """MSI-X with its table and pending bits at (BAR, offset in it); both offsets are multiples of 8."""
        if not 1 <= vectors <= 2048 or table[1] % 8 or pba[1] % 8 or self.msix is not None:
            raise PluginError(f"an MSI-X capability with {vectors} vectors at {table} and {pba} cannot be")
        body = (vectors - 1).to_bytes(2, "little")
        body += (table[1] | table[0]).to_bytes(4, "little") + (pba[1] | pba[0]).to_bytes(4, "little")
        self.add_capability(
            offset, uapi.PCI_CAP_ID_MSIX, body, (_MSIX_ENABLE | _MSIX_FUNCTION_MASK).to_bytes(2, "little")
        )
        self.msix = Msix(offset, vectors, *table, *pba)

    def add_power_management(self, offset: int) -> None:
        """Power management, version 3, D0 and D3hot; coming back to D0 resets nothing."""
        body = (3).to_bytes(2, "little") + _PM_NO_SOFT_RESET.to_bytes(2, "little") + bytes(2)
        self.add_capability(offset, uapi.PCI_CAP_ID_PM, body, bytes(2) + _PM_STATE.to_bytes(2, "little"))
        self._power = offset + 4

    def add_express(self, offset: int, *, flr: bool = True, port_type: int = 0, version: int = 2) -> None:
        """PCI Express, a link of one lane; `port_type` 0 is an endpoint, 9 one inside the root complex. `version` 1 has
        20 bytes, 2 has 60.
        """
        devcap = _EXP_DEVCAP_ROLE_BASED | (_EXP_DEVCAP_FLR if flr else 0)
        link = 0 if port_type == 9 else 0x11
        if version not in _EXP_SIZES:
            raise PluginError(f"there is no PCI Express capability of version {version} here")
        body = bytearray(_EXP_SIZES[version] - 2)
        writable = bytearray(len(body))
        clears = bytearray(len(body))
        body[0:2] = (version | port_type << 4).to_bytes(2, "little")
        body[2:6] = devcap.to_bytes(4, "little")
        body[6:8] = _EXP_DEVCTL_RESET.to_bytes(2, "little")
        body[0xA:0xE] = link.to_bytes(4, "little")
        body[0x10:0x12] = link.to_bytes(2, "little")
        writable[6:8] = _EXP_DEVCTL_WRITABLE.to_bytes(2, "little")
        clears[8:10] = _EXP_DEVSTA_W1C.to_bytes(2, "little")
        self.add_capability(offset, uapi.PCI_CAP_ID_EXP, bytes(body), bytes(writable), bytes(clears))
        self._express = offset if flr else None

    def add_vendor(self, offset: int, data: bytes, writable: bytes = b"") -> None:
        """A vendor specific capability: `data` follows the length byte that is made here."""
        body = bytes([3 + len(data)]) + data
        self.add_capability(offset, _CAP_ID_VENDOR, body, b"\0" + writable)

    def add_register(
        self, offset: int, width: int, reset: int = 0, *, writable: int = 0, write_clears: int = 0
    ) -> None:
        """A register of the device's own outside of any capability, of `width` bytes."""
        self._claim(offset, width, "register")
        self._declare(offset, width, reset, writable=writable, write_clears=write_clears)

    # the client's side

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. ClientError (EINVAL) outside of the space."""
        self._check(offset, length)
        return bytes(self._bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """What a client's write of any width and alignment does. ClientError (EINVAL) outside of the space."""
        self._check(offset, len(data))
        for at, new in enumerate(data, offset):
            may = self._writable[at]
            kept = (self._bytes[at] & ~may) | (new & may)
            self._bytes[at] = kept & ~(new & self._write_clears[at])
        if self.msi is not None and self._touches(offset, len(data), self.msi.offset + 2, 2):
            self._clamp_msi(self.msi)
        if self._express is not None and self.on_function_reset is not None:
            control = self._express + _EXP_DEVCTL
            high = control + 1 - offset
            if 0 <= high < len(data) and data[high] & (_EXP_DEVCTL_FLR >> 8):
                self.on_function_reset()

    # the hardware's side

    def get(self, offset: int, width: int) -> int:
        """The register of `width` bytes at `offset`."""
        return int.from_bytes(self.read(offset, width), "little")

    def set(self, offset: int, width: int, value: int) -> None:
        """Set a register as hardware does, whatever its masks."""
        self._check(offset, width)
        self._bytes[offset : offset + width] = value.to_bytes(width, "little")

    def reset(self) -> None:
        """Everything that was declared gets its reset value; scratch bytes stay."""
        for at in range(self.size):
            if self._owned[at]:
                self._bytes[at] = self._reset[at]

    @property
    def command(self) -> int:
        """The COMMAND register."""
        return self.get(uapi.PCI_COMMAND, 2)

    @property
    def bus_master(self) -> bool:
        """The function may start DMA and send messages."""
        return bool(self.command & uapi.PCI_COMMAND_MASTER)

    @property
    def memory_enabled(self) -> bool:
        """Memory BARs are decoded, and the function is not in D3hot."""
        return bool(self.command & uapi.PCI_COMMAND_MEMORY) and self.power_state == 0

    @property
    def intx_disabled(self) -> bool:
        """The function may not drive INTx."""
        return bool(self.command & uapi.PCI_COMMAND_INTX_DISABLE)

    @property
    def power_state(self) -> int:
        """0 (D0) to 3 (D3hot)."""
        return 0 if self._power is None else self.get(self._power, 2) & _PM_STATE

    @property
    def msi_enabled(self) -> bool:
        """The enable bit of the MSI capability."""
        return self.msi is not None and bool(self.get(self.msi.offset + 2, 2) & _MSI_ENABLE)

    @property
    def msix_enabled(self) -> bool:
        """The enable bit of the MSI-X capability."""
        return self.msix is not None and bool(self.get(self.msix.offset + 2, 2) & _MSIX_ENABLE)

    @property
    def is_express(self) -> bool:
        """There is a PCI Express capability."""
        return self._find(uapi.PCI_CAP_ID_EXP) is not None

    @property
    def interrupt_pin(self) -> int:
        """0: no INTx; 1 to 4: pins A to D."""
        return self.get(uapi.PCI_INTERRUPT_PIN, 1)

    def set_interrupt_status(self, level: bool) -> None:
        """Show in STATUS whether the function wants INTx high."""
        status = self.get(uapi.PCI_STATUS, 2) & ~uapi.PCI_STATUS_INTERRUPT
        self.set(uapi.PCI_STATUS, 2, status | (uapi.PCI_STATUS_INTERRUPT if level else 0))

    # inside

    def _find(self, cap_id: int) -> int | None:
        at = self.get(uapi.PCI_CAPABILITY_LIST, 1)
        while at:
            if self.get(at, 1) == cap_id:
                return at
            at = self.get(at + 1, 1)
        return None

    def _clamp_msi(self, msi: Msi) -> None:
        control = self.get(msi.offset + 2, 2)
        capable = (control & _MSI_CAPABLE) >> 1
        if control & _MSI_ENABLE and (control & _MSI_QSIZE) >> 4 > capable:
            self.set(msi.offset + 2, 2, (control & ~_MSI_QSIZE) | capable << 4)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ClientError(f"config space has {self.size} bytes: {length} at {offset:#x} lie outside")

    @staticmethod
    def _touches(offset: int, length: int, start: int, size: int) -> bool:
        return offset < start + size and start < offset + length

    def _claim(self, offset: int, size: int, name: str) -> None:
        if offset < HEADER_SIZE or offset + size > self.size or any(self._owned[offset : offset + size]):
            raise PluginError(f"config space: {name} of {size} bytes at {offset:#x} is outside or overlaps another")
        for masks in (self._writable, self._write_clears, self._bytes, self._reset):
            masks[offset : offset + size] = bytes(size)
        self._owned[offset : offset + size] = b"\1" * size

    def _declare(self, offset: int, width: int, value: int, *, writable: int = 0, write_clears: int = 0) -> None:
        if writable & write_clears:
            raise PluginError(f"config space at {offset:#x}: bits are both writable and cleared by a write")
        try:
            fields = [number.to_bytes(width, "little") for number in (value, writable, write_clears)]
        except OverflowError:
            raise PluginError(f"config space at {offset:#x}: a number does not fit {width} bytes") from None
        for target, field in zip((self._bytes, self._writable, self._write_clears), fields, strict=True):
            target[offset : offset + width] = field
        self._reset[offset : offset + width] = fields[0]
