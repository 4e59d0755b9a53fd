"""A state stream in words: header, sections, the server's config section as registers, the end.

It must not read anything; it is handed what was read. Text that came out of a stream is printed without control
characters.
"""

import struct
from collections.abc import Iterator

from vfu_server import uapi
from vfu_server.logs import plain
from vfu_server.stream import FORMAT_VERSION, SectionRecord, StreamEnd, StreamHeader

_CAPABILITIES = {0x01: "PM", 0x03: "VPD", 0x05: "MSI", 0x09: "vendor", 0x10: "PCIe", 0x11: "MSI-X", 0x13: "AF"}
_COMMAND = {
    uapi.PCI_COMMAND_IO: "IO",
    uapi.PCI_COMMAND_MEMORY: "MEMORY",
    uapi.PCI_COMMAND_MASTER: "MASTER",
    uapi.PCI_COMMAND_INTX_DISABLE: "INTX_DISABLE",
}


def header_lines(header: StreamHeader) -> Iterator[str]:
    """Who wrote it, and for which device."""
    state, device = header.state, header.device
    yield plain(f"format {FORMAT_VERSION}, plugin {header.plugin} {header.plugin_version}")
    yield plain(f"state of {state.variant}, version {state.state_version}, features {state.features:#x}")
    subsystem = f"{device.subsystem_vendor:04x}:{device.subsystem:04x}"
    ids = f"{device.vendor:04x}:{device.device:04x} subsystem {subsystem}"
    yield f"device {ids} revision {device.revision:02x} class {device.class_code:06x}"
    if state.firmware or device.firmware:
        yield plain(f"firmware: the state asks for {state.firmware!r}, the device had {device.firmware!r}")


def section_line(record: SectionRecord, position: int, sums: str) -> str:
    """One section: where it is, whose, how long, what its sums say."""
    flags = [name for name, on in (("optional", record.optional), ("padding", record.padding)) if on]
    marks = f", {', '.join(flags)}" if flags else ""
    return f"byte {position}: section {record}, {record.length} bytes{marks}; {sums}"


def end_line(end: StreamEnd) -> str:
    """The end record."""
    return f"end: {end.sections} sections in {end.length} bytes, {end.skipped} of them padding; all sums right"


def summary(header: StreamHeader | None, end: StreamEnd | None) -> str:
    """One line for a stream that was read to its end."""
    if header is None or end is None:
        return "no stream"
    return plain(
        f"{end.sections} sections in {end.length} bytes, all sums right: {header.state.variant} ({header.plugin})"
    )


def config_lines(config: bytes) -> list[str]:
    """Config space as registers: what a guest writes, and which capabilities there are."""

    def word(offset: int) -> int:
        return int(struct.unpack_from("<H", config, offset)[0])

    command = word(uapi.PCI_COMMAND)
    bits = [name for bit, name in _COMMAND.items() if command & bit]
    single = {
        "CACHE_LINE_SIZE": uapi.PCI_CACHE_LINE_SIZE,
        "LATENCY_TIMER": uapi.PCI_LATENCY_TIMER,
        "INTERRUPT_LINE": uapi.PCI_INTERRUPT_LINE,
        "INTERRUPT_PIN": uapi.PCI_INTERRUPT_PIN,
    }
    lines = [
        f"COMMAND {command:#06x} ({' '.join(bits) or 'all off'}), STATUS {word(uapi.PCI_STATUS):#06x}",
        ", ".join(f"{name} {config[offset]:#04x}" for name, offset in single.items()),
    ]
    bars = struct.unpack_from("<6I", config, uapi.PCI_BASE_ADDRESS_0)
    lines += [f"BAR{n} {value:#010x}" for n, value in enumerate(bars) if value]
    if rom := struct.unpack_from("<I", config, uapi.PCI_ROM_ADDRESS)[0]:
        lines.append(f"ROM {rom:#010x}")
    return lines + [f"capability {_CAPABILITIES.get(kind, f'{kind:#04x}')} at {at:#04x}" for at, kind in _walk(config)]


def _walk(config: bytes) -> Iterator[tuple[int, int]]:
    """(offset, id) of each capability; a list that loops or leaves the space ends where it does."""
    status = config[uapi.PCI_STATUS]
    at = config[uapi.PCI_CAPABILITY_LIST] & ~3 if status & uapi.PCI_STATUS_CAP_LIST else 0
    seen: set[int] = set()
    while 0x40 <= at <= 0xFC and at not in seen:
        seen.add(at)
        yield at, config[at]
        at = config[at + 1] & ~3
