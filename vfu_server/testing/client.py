"""`Client`: every vfio-user command as a typed method, checked as strictly as QEMU checks its server.

It knows the messages and their layouts; order, PCI and guests are for `guest`, moving a device for `migrate`.
"""

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vfu_server import uapi
from vfu_server.device import PrecopyInfo
from vfu_server.host_device import IrqInfo, MmapArea, RegionInfo
from vfu_server.testing.wire import Connection, ProtocolError, ReplyError
from vfu_server.uapi import Command, Feature, HeaderFlag, MigState

QEMU_CAPABILITIES: dict[str, Any] = {
    "pgsizes": 4096,
    "max_msg_fds": 16,
    "max_dma_maps": 65535,
    "max_data_xfer_size": 1048576,
    "migration": {"max_bitmap_size": 268435456, "pgsize": 4096},
    "write_multiple": True,
}
"""What QEMU 11.1 offers."""


@dataclass(frozen=True, slots=True)
class Version:
    """What the server answered to VERSION; limits are the protocol's defaults where it named none."""

    major: int
    minor: int
    capabilities: Mapping[str, Any]
    max_msg_fds: int
    max_data_xfer_size: int
    max_dma_maps: int
    write_multiple: bool


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """DEVICE_GET_INFO: `flags` are uapi.DEVICE_FLAGS_*."""

    flags: int
    num_regions: int
    num_irqs: int

    @property
    def can_reset(self) -> bool:
        """Whether DEVICE_RESET is offered."""
        return bool(self.flags & uapi.DEVICE_FLAGS_RESET)


class Client(Connection):
    """A vfio-user client. All methods wait for the reply; a refusal is a ReplyError with the server's errno."""

    version: Version | None = None

    @property
    def max_msg_fds(self) -> int:
        """How many fds one message may carry, as negotiated."""
        return 1 if self.version is None else self.version.max_msg_fds

    def negotiate(self, caps: Mapping[str, Any] | None = None, minor: int = 0) -> Version:
        """Send VERSION, with QEMU's capabilities unless others are given, and keep the limits that were agreed on."""
        offered = QEMU_CAPABILITIES if caps is None else caps
        text = json.dumps({"capabilities": offered}).encode() + b"\0"
        reply = self.call(Command.VERSION, uapi.VERSION.pack(0, minor) + text, room=4096)
        self.version = _parse_version(reply.payload, minor)
        self.max_data_xfer_size = int(offered.get("max_data_xfer_size", uapi.MAX_DATA_XFER_SIZE))
        return self.version

    # information

    def get_info(self) -> DeviceInfo:
        """DEVICE_GET_INFO."""
        reply = self.call(Command.DEVICE_GET_INFO, uapi.DEVICE_INFO.pack(uapi.DEVICE_INFO.size, 0, 0, 0))
        _expect_length("DEVICE_GET_INFO", reply.payload, uapi.DEVICE_INFO.size)
        argsz, flags, regions, irqs = uapi.DEVICE_INFO.unpack(reply.payload)
        if argsz != uapi.DEVICE_INFO.size or regions > 100 or irqs > 50:
            raise ProtocolError(f"DEVICE_GET_INFO was answered argsz {argsz}, {regions} regions, {irqs} irqs")
        return DeviceInfo(flags, regions, irqs)

    def get_region_info(self, index: int) -> RegionInfo:
        """GET_REGION_INFO, asked again with more room if there are capabilities. The caller owns the fd (-1: none).

        As QEMU does, the short first reply is refused if its cap_offset does not lie in the full reply.
        """
        room = uapi.REGION_INFO.size
        while True:
            reply = self.call(
                Command.DEVICE_GET_REGION_INFO, uapi.REGION_INFO.pack(room, 0, index, 0, 0, 0), room=room, reply_fds=1
            )
            try:
                if len(reply.payload) < uapi.REGION_INFO.size:
                    raise ProtocolError(f"GET_REGION_INFO was answered with {len(reply.payload)} bytes")
                argsz, flags, _, cap_offset, size, offset = uapi.REGION_INFO.unpack_from(reply.payload)
                if flags & uapi.REGION_INFO_FLAG_CAPS and not (
                    uapi.REGION_INFO.size <= cap_offset <= argsz - uapi.CAP_HEADER.size
                ):
                    raise ProtocolError(f"region {index}: cap_offset {cap_offset} is not in a reply of {argsz} bytes")
                areas = () if argsz > room else parse_sparse_areas(reply.payload, flags, cap_offset)
            except ProtocolError:
                reply.close_fds()
                raise
            if argsz <= room:
                fd = reply.fds[0] if reply.fds else -1
                return RegionInfo(index, size, flags, areas, fd, offset)
            reply.close_fds()
            room = argsz

    def get_irq_info(self, index: int) -> IrqInfo:
        """GET_IRQ_INFO."""
        reply = self.call(Command.DEVICE_GET_IRQ_INFO, uapi.IRQ_INFO.pack(uapi.IRQ_INFO.size, 0, index, 0))
        _expect_length("DEVICE_GET_IRQ_INFO", reply.payload, uapi.IRQ_INFO.size)
        _, flags, answered, count = uapi.IRQ_INFO.unpack(reply.payload)
        if answered != index:
            raise ProtocolError(f"GET_IRQ_INFO for index {index} was answered for index {answered}")
        return IrqInfo(index, count, flags)

    # regions

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """REGION_READ of `count` bytes in one message."""
        head = uapi.REGION_ACCESS.pack(offset, region, count)
        reply = self.call(Command.REGION_READ, head, room=len(head) + count)
        if reply.payload[: len(head)] != head or len(reply.payload) != len(head) + count:
            raise ProtocolError(f"REGION_READ of {count} bytes was answered with {len(reply.payload)} bytes of payload")
        return reply.payload[len(head) :]

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """REGION_WRITE of `data` in one message. Posted: without a reply, so also without an error."""
        head = uapi.REGION_ACCESS.pack(offset, region, len(data))
        if posted:
            self.send_message(Command.REGION_WRITE, head + data, flags=HeaderFlag.NO_REPLY)
            return
        reply = self.call(Command.REGION_WRITE, head + data)
        if reply.payload != head:
            raise ProtocolError(f"REGION_WRITE of {len(data)} bytes was answered {reply.payload.hex()}")

    def read(self, region: int, offset: int, width: int) -> int:
        """A register read of 1 to 8 bytes."""
        return int.from_bytes(self.region_read(region, offset, width), "little")

    def write(self, region: int, offset: int, width: int, value: int, *, posted: bool = False) -> None:
        """A register write of 1 to 8 bytes."""
        self.region_write(region, offset, value.to_bytes(width, "little"), posted=posted)

    def read_block(self, region: int, offset: int, length: int) -> bytes:
        """`length` bytes in as many messages as the server's transfer limit needs."""
        step = self._transfer_limit
        return b"".join(self.region_read(region, offset + at, min(step, length - at)) for at in range(0, length, step))

    def write_block(self, region: int, offset: int, data: bytes) -> None:
        """Write `data` in as many messages as the server's transfer limit needs."""
        step = self._transfer_limit
        for at in range(0, len(data), step):
            self.region_write(region, offset + at, data[at : at + step])

    @property
    def _transfer_limit(self) -> int:
        return uapi.MAX_DATA_XFER_SIZE if self.version is None else self.version.max_data_xfer_size

    # DMA

    def dma_map(
        self,
        iova: int,
        size: int,
        *,
        prot: int = uapi.DMA_FLAG_READ | uapi.DMA_FLAG_WRITE,
        fd: int = -1,
        fd_offset: int = 0,
    ) -> None:
        """DMA_MAP. Without an fd the server reaches the memory by messages. The fd stays the caller's."""
        payload = uapi.DMA_MAP.pack(uapi.DMA_MAP.size, prot, fd_offset, iova, size)
        reply = self.call(Command.DMA_MAP, payload, [] if fd < 0 else [fd])
        _expect_length("DMA_MAP", reply.payload, 0)

    def dma_unmap(self, iova: int, size: int, *, flags: int = 0) -> None:
        """DMA_UNMAP of everything in the range."""
        payload = uapi.DMA_UNMAP.pack(uapi.DMA_UNMAP.size, flags, iova, size)
        reply = self.call(Command.DMA_UNMAP, payload)
        _expect_length("DMA_UNMAP", reply.payload, uapi.DMA_UNMAP.size)

    def dma_unmap_all(self) -> None:
        """DMA_UNMAP with the flag ALL."""
        self.dma_unmap(0, 0, flags=uapi.DMA_UNMAP_FLAG_ALL)

    # interrupts and reset

    def set_irqs(
        self, index: int, flags: int, start: int = 0, count: int = 0, *, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """DEVICE_SET_IRQS in one message. `fds` are eventfds; with DATA_EVENTFD and none the vectors are disarmed."""
        payload = uapi.IRQ_SET.pack(uapi.IRQ_SET.size + len(data), flags, index, start, count) + data
        reply = self.call(Command.DEVICE_SET_IRQS, payload, fds)
        _expect_length("DEVICE_SET_IRQS", reply.payload, 0)

    def set_irq_eventfds(self, index: int, start: int, fds: Sequence[int]) -> None:
        """Arm vectors `start`.. with eventfds, in messages of as many fds as the server takes."""
        step = max(1, min(16, self.max_msg_fds))
        flags = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER
        for at in range(0, len(fds), step):
            part = fds[at : at + step]
            self.set_irqs(index, flags, start + at, len(part), fds=part)

    def disarm_irqs(self, index: int, start: int, count: int) -> None:
        """Take the eventfds of `count` vectors away; the index stays enabled."""
        self.set_irqs(index, uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER, start, count)

    def disable_irqs(self, index: int) -> None:
        """Switch an interrupt index off."""
        self.set_irqs(index, uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER)

    def trigger_irqs(self, index: int, start: int, which: Sequence[bool]) -> None:
        """Have the server signal those of the vectors `start`.. that are true."""
        flags = uapi.IRQ_SET_DATA_BOOL | uapi.IRQ_SET_ACTION_TRIGGER
        self.set_irqs(index, flags, start, len(which), data=bytes(which))

    def unmask_irq(self, index: int, vector: int = 0) -> None:
        """The guest has handled it: unmask."""
        self.set_irqs(index, uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_UNMASK, vector, 1)

    def mask_irq(self, index: int, vector: int = 0) -> None:
        """Mask a vector."""
        self.set_irqs(index, uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_MASK, vector, 1)

    def reset(self) -> None:
        """DEVICE_RESET."""
        _expect_length("DEVICE_RESET", self.call(Command.DEVICE_RESET).payload, 0)

    # features and migration

    def device_feature(self, flags: int, data: bytes = b"", room: int = 0) -> bytes:
        """DEVICE_FEATURE as it is: `flags` with the feature's id, `data` behind the header; returns the reply's data.

        `room` is how many bytes of data the reply may have (at least as many as were sent).
        """
        header = uapi.DEVICE_FEATURE.size
        size = header + max(len(data), room)
        reply = self.call(Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(size, flags) + data, room=size)
        if len(reply.payload) < header:
            raise ProtocolError(f"DEVICE_FEATURE was answered with {len(reply.payload)} bytes")
        return reply.payload[header:]

    def feature_get(self, feature: int, data: bytes = b"", room: int = 64) -> bytes:
        """GET a feature."""
        return self.device_feature(feature | uapi.FEATURE_GET, data, room)

    def feature_set(self, feature: int, data: bytes = b"") -> bytes:
        """SET a feature."""
        return self.device_feature(feature | uapi.FEATURE_SET, data)

    def feature_probe(self, feature: int, ways: int = 0) -> bool:
        """Whether the device has `feature` in all of `ways` (uapi.FEATURE_GET, FEATURE_SET)."""
        try:
            self.device_feature(feature | uapi.FEATURE_PROBE | ways)
        except ReplyError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return False
            raise
        return True

    def migration_flags(self) -> int:
        """Feature MIGRATION: uapi.MIGRATION_*; 0 where the device does not migrate."""
        try:
            data = self.feature_get(Feature.MIGRATION)
        except ReplyError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return 0
            raise
        _expect_length("feature MIGRATION", data, uapi.FEATURE_MIGRATION.size)
        return int(uapi.FEATURE_MIGRATION.unpack(data)[0])

    def mig_state(self) -> MigState:
        """The device's migration state."""
        data = self.feature_get(Feature.MIG_DEVICE_STATE)
        _expect_length("feature MIG_DEVICE_STATE", data, uapi.FEATURE_STATE.size)
        state, data_fd = uapi.FEATURE_STATE.unpack(data)
        if data_fd != uapi.NO_DATA_FD:
            raise ProtocolError(f"state was answered with data_fd {data_fd}, which a VMM would take for one of its own")
        return MigState(state)

    def set_mig_state(self, state: int) -> None:
        """Ask for a migration state; returns when the device is there."""
        request = uapi.FEATURE_STATE.pack(state, uapi.NO_DATA_FD)
        if self.feature_set(Feature.MIG_DEVICE_STATE, request) != request:
            raise ProtocolError("SET of MIG_DEVICE_STATE was not answered with the request's bytes")

    def mig_data_size(self) -> int:
        """Feature MIG_DATA_SIZE: bytes that a STOP_COPY would give, as estimated."""
        data = self.feature_get(Feature.MIG_DATA_SIZE)
        _expect_length("feature MIG_DATA_SIZE", data, uapi.FEATURE_DATA_SIZE.size)
        return int(uapi.FEATURE_DATA_SIZE.unpack(data)[0])

    def precopy_info(self) -> PrecopyInfo:
        """Feature MIG_PRECOPY_INFO by GET: what a pre-copy has still to give. PRE_COPY and PRE_COPY_P2P only."""
        data = self.feature_get(Feature.MIG_PRECOPY_INFO)
        _expect_length("feature MIG_PRECOPY_INFO", data, uapi.FEATURE_PRECOPY_INFO.size)
        argsz, flags, initial, dirty = uapi.FEATURE_PRECOPY_INFO.unpack(data)
        if argsz != len(data):
            raise ProtocolError(f"feature MIG_PRECOPY_INFO was answered argsz {argsz}")
        return PrecopyInfo(initial, dirty, bool(flags & uapi.PRECOPY_INFO_REINIT))

    def mig_data_read(self, size: int = uapi.MAX_DATA_XFER_SIZE) -> bytes:
        """MIG_DATA_READ of up to `size` bytes; none is the end in STOP_COPY. ReplyError ENOMSG: nothing yet."""
        header = uapi.MIG_DATA.size
        reply = self.call(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(header + size, size), room=header + size)
        if len(reply.payload) < header:
            raise ProtocolError(f"MIG_DATA_READ was answered with {len(reply.payload)} bytes")
        argsz, got = uapi.MIG_DATA.unpack_from(reply.payload)
        if got > size or argsz != header + got or len(reply.payload) < header + got:
            raise ProtocolError(f"MIG_DATA_READ was answered argsz {argsz}, size {got}, {len(reply.payload)} bytes")
        return reply.payload[header : header + got]

    def mig_data_write(self, data: bytes) -> None:
        """MIG_DATA_WRITE: all of it or an error."""
        payload = uapi.MIG_DATA.pack(uapi.MIG_DATA.size + len(data), len(data)) + data
        _expect_length("MIG_DATA_WRITE", self.call(Command.MIG_DATA_WRITE, payload).payload, 0)

    # dirty pages

    def dma_logging_start(self, ranges: Sequence[tuple[int, int]], page_size: int = uapi.PAGE_SIZE) -> int:
        """Begin to track writes by the device in `ranges` of (iova, length). Returns the real page size."""
        request = uapi.FEATURE_LOGGING_START.pack(page_size, len(ranges), 0)
        request += b"".join(uapi.LOGGING_RANGE.pack(*item) for item in ranges)
        reply = self.feature_set(Feature.DMA_LOGGING_START, request)
        _expect_length("DMA_LOGGING_START", reply, len(request))
        return int(uapi.FEATURE_LOGGING_START.unpack_from(reply)[0])

    def dma_logging_stop(self) -> None:
        """End it."""
        self.feature_set(Feature.DMA_LOGGING_STOP)

    def dma_logging_report(self, iova: int, length: int, page_size: int = uapi.PAGE_SIZE) -> bytes:
        """The bitmap of pages written since the last report: bit k of its bytes is the page at iova + k * page_size."""
        head = uapi.FEATURE_LOGGING_REPORT.pack(iova, length, page_size)
        words = (-(-length // page_size) + 63) // 64
        reply = self.feature_get(Feature.DMA_LOGGING_REPORT, head, len(head) + words * 8)
        if reply[: len(head)] != head or len(reply) != len(head) + words * 8:
            raise ProtocolError(f"DMA_LOGGING_REPORT for {words} words was answered with {len(reply)} bytes")
        return reply[len(head) :]


def dirty_pages(bitmap: bytes, iova: int, page_size: int = uapi.PAGE_SIZE) -> Iterator[int]:
    """The iovas of the pages whose bit is set."""
    bits = int.from_bytes(bitmap, "little")
    while bits:
        lowest = bits & -bits
        yield iova + (lowest.bit_length() - 1) * page_size
        bits ^= lowest


def parse_sparse_areas(info: bytes, flags: int, cap_offset: int) -> tuple[MmapArea, ...]:
    """The mappable areas that a GET_REGION_INFO payload names; ProtocolError for a chain that cannot be walked."""
    if not flags & uapi.REGION_INFO_FLAG_CAPS:
        return ()
    seen: set[int] = set()
    while cap_offset:
        if cap_offset in seen or cap_offset + uapi.CAP_HEADER.size > len(info):
            raise ProtocolError(f"the chain of region capabilities is broken at {cap_offset}")
        seen.add(cap_offset)
        cap_id, _, following = uapi.CAP_HEADER.unpack_from(info, cap_offset)
        if cap_id == uapi.REGION_INFO_CAP_SPARSE_MMAP:
            return _sparse_areas(info, cap_offset + uapi.CAP_HEADER.size)
        cap_offset = following
    return ()


def _sparse_areas(info: bytes, at: int) -> tuple[MmapArea, ...]:
    if at + uapi.SPARSE_HEADER.size > len(info):
        raise ProtocolError("the sparse mmap capability is cut short")
    count, _ = uapi.SPARSE_HEADER.unpack_from(info, at)
    at += uapi.SPARSE_HEADER.size
    if at + count * uapi.SPARSE_AREA.size > len(info):
        raise ProtocolError(f"the sparse mmap capability claims {count} areas, more than were sent")
    return tuple(MmapArea(*uapi.SPARSE_AREA.unpack_from(info, at + i * uapi.SPARSE_AREA.size)) for i in range(count))


def _parse_version(payload: bytes, minor: int) -> Version:
    if len(payload) < uapi.VERSION.size:
        raise ProtocolError(f"VERSION was answered with {len(payload)} bytes")
    major, answered = uapi.VERSION.unpack_from(payload)
    if major != 0 or answered > minor:
        raise ProtocolError(f"incompatible server version: asked for 0.{minor}, was answered {major}.{answered}")
    text = payload[uapi.VERSION.size :]
    caps: dict[str, Any] = {}
    if text:
        if not text.endswith(b"\0"):
            raise ProtocolError("the JSON of the VERSION reply has no NUL at its end")
        try:
            caps = dict(json.loads(text[:-1])["capabilities"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"the VERSION reply has no JSON capabilities: {text!r}") from error
    version = Version(
        major,
        answered,
        caps,
        max_msg_fds=caps.get("max_msg_fds", 1),
        max_data_xfer_size=caps.get("max_data_xfer_size", uapi.MAX_DATA_XFER_SIZE),
        max_dma_maps=caps.get("max_dma_maps", 65535),
        write_multiple=caps.get("write_multiple", False),
    )
    # the bounds that QEMU puts on a server's answer
    if version.max_msg_fds > 16 or version.max_data_xfer_size > 64 << 20 or version.max_dma_maps > 65535:
        raise ProtocolError(f"the VERSION reply exceeds what a VMM accepts: {caps}")
    pgsizes = caps.get("pgsizes", 4096)
    if pgsizes < 4096 or pgsizes % 4096:
        raise ProtocolError(f"the VERSION reply names page sizes {pgsizes:#x}")
    return version


def _expect_length(what: str, payload: bytes, length: int) -> None:
    if len(payload) != length:
        raise ProtocolError(f"{what} was answered with {len(payload)} bytes of payload where {length} are due")
