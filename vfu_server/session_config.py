"""The server's own section of a stream: config space as the guest left it.

MSI and MSI-X belong to the client, which sets them up again by SET_IRQS; what a guest has written into the header does
not come back from there. An interrupt that was pending needs no section: a raised INTx follows from the device's own
state once that is written back, and a message that was sent is in the client's eventfd.
"""

from vfu_server import uapi
from vfu_server.errors import RestoreError, StreamFormatError
from vfu_server.host_device import HostDevice
from vfu_server.uapi import RegionIndex

# offset, bytes: what a guest may have written into the standard header, COMMAND last since it switches decoding on
WRITABLE = (
    (uapi.PCI_CACHE_LINE_SIZE, 1),
    (uapi.PCI_LATENCY_TIMER, 1),
    *((uapi.PCI_BASE_ADDRESS_0 + 4 * i, 4) for i in range(6)),
    (uapi.PCI_ROM_ADDRESS, 4),
    (uapi.PCI_INTERRUPT_LINE, 1),
    (uapi.PCI_COMMAND, 2),
)
# What must read the same on both sides, or the stream is for a device of another shape: ids and class are in the header
FIXED = ((uapi.PCI_HEADER_TYPE, 1), (uapi.PCI_CAPABILITY_LIST, 1), (uapi.PCI_INTERRUPT_PIN, 1))


def save_config(host: HostDevice) -> bytes:
    """The config space as it reads now."""
    return host.read_block(RegionIndex.CONFIG, 0, host.regions[RegionIndex.CONFIG].size)


def check_config(host: HostDevice, payload: bytes) -> None:
    """Raise StreamFormatError if `payload` cannot be this device's config space."""
    size = host.regions[RegionIndex.CONFIG].size
    if len(payload) != size:
        raise StreamFormatError(f"section config: {len(payload)} bytes of config space, this device has {size}")
    for offset, width in FIXED:
        mine = host.read(RegionIndex.CONFIG, offset, width)
        theirs = int.from_bytes(payload[offset : offset + width], "little")
        if mine != theirs:
            raise StreamFormatError(f"section config: {theirs:#x} at {offset:#x}, this device has {mine:#x}")


def load_config(host: HostDevice, payload: bytes) -> None:
    """Write back what the guest had written. Raises RestoreError if a BAR does not hold its address."""
    for offset, width in WRITABLE:
        value = int.from_bytes(payload[offset : offset + width], "little")
        if host.read(RegionIndex.CONFIG, offset, width) == value:
            continue
        host.write(RegionIndex.CONFIG, offset, width, value)
        if width == 4 and (read := host.read(RegionIndex.CONFIG, offset, width)) != value:
            raise RestoreError(f"config space at {offset:#x} reads {read:#x} after {value:#x} was written")


def flr_bits(header: bytes) -> list[tuple[int, int]]:
    """The (config offset, bit mask) whose write resets the function: PCIe DEVCTL and AF control, where the capability
    says so.

    `header`: the first 256 bytes of config space. A list that loops or leaves the space ends where it does.
    """
    found: list[tuple[int, int]] = []
    at = header[uapi.PCI_CAPABILITY_LIST] & ~3 if header[uapi.PCI_STATUS] & uapi.PCI_STATUS_CAP_LIST else 0
    seen: set[int] = set()
    while 0x40 <= at <= len(header) - 16 and at not in seen:
        seen.add(at)
        if header[at] == uapi.PCI_CAP_ID_EXP and header[at + 7] & 0x10:  # DEVCAP bit 28
            found.append((at + 9, 0x80))  # DEVCTL bit 15
        elif header[at] == uapi.PCI_CAP_ID_AF and header[at + 3] & 0x02:
            found.append((at + 4, 0x01))
        at = header[at + 1] & ~3
    return found


def without_flr(header: bytes, offset: int, data: bytes) -> bytes:
    """A write of config space at `offset` with the bits left out that would reset the function."""
    kept = bytearray(data)
    for at, mask in flr_bits(header):
        if offset <= at < offset + len(kept):
            kept[at - offset] &= ~mask & 0xFF
    return bytes(kept)
