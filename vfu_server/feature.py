"""DEVICE_FEATURE requests: decoded and checked in the kernel's order, with its errnos; and the replies to them.

Decisions only: it does not know what the device does with a request. Layouts: linux/vfio.h; where the kernel's struct
has a pointer (ranges, bitmap), vfio-user puts the data in its place.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from vfu_server.device import PrecopyInfo
from vfu_server.errors import ClientError
from vfu_server.uapi import (
    DEVICE_FEATURE,
    FEATURE_DATA_SIZE,
    FEATURE_GET,
    FEATURE_ID_MASK,
    FEATURE_LOGGING_REPORT,
    FEATURE_LOGGING_START,
    FEATURE_MIGRATION,
    FEATURE_PRECOPY_INFO,
    FEATURE_PROBE,
    FEATURE_SET,
    FEATURE_STATE,
    LOGGING_RANGE,
    MIGRATION_PRE_COPY,
    NO_DATA_FD,
    PAGE_SIZE,
    PRECOPY_INFO_REINIT,
    Feature,
    MigState,
)

ADDRESS_SPACE: Final = 1 << 64

MAX_LOGGING_RANGES: Final = PAGE_SIZE // LOGGING_RANGE.size
"""As many as the kernel takes: what fits into one of its pages. More is E2BIG."""

_LOGGING: Final = frozenset({Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT})
_MIGRATION: Final = frozenset({Feature.MIGRATION, Feature.MIG_DEVICE_STATE, Feature.MIG_DATA_SIZE})

_WAYS: Final = MappingProxyType(
    {
        Feature.MIGRATION: FEATURE_GET,
        Feature.MIG_DEVICE_STATE: FEATURE_GET | FEATURE_SET,
        Feature.DMA_LOGGING_START: FEATURE_SET,
        Feature.DMA_LOGGING_STOP: FEATURE_SET,
        Feature.DMA_LOGGING_REPORT: FEATURE_GET,
        Feature.MIG_DATA_SIZE: FEATURE_GET,
        # GET is vfio-user's own: it takes the place of the ioctl MIG_GET_PRECOPY_INFO on the data fd
        Feature.MIG_PRECOPY_INFO: FEATURE_GET | FEATURE_SET,
    }
)

# Bytes of data (behind the header) that a request needs room for in its argsz.
_ROOM: Final = MappingProxyType(
    {
        Feature.MIGRATION: FEATURE_MIGRATION.size,
        Feature.MIG_DEVICE_STATE: FEATURE_STATE.size,
        Feature.DMA_LOGGING_START: FEATURE_LOGGING_START.size,
        Feature.DMA_LOGGING_REPORT: FEATURE_LOGGING_REPORT.size,
        Feature.MIG_DATA_SIZE: FEATURE_DATA_SIZE.size,
    }
)

# Those whose data the client has to send, for these ways. Else data is answered only.
_SENT: Final = MappingProxyType(
    {
        Feature.MIG_DEVICE_STATE: FEATURE_SET,
        Feature.DMA_LOGGING_START: FEATURE_SET,
        Feature.DMA_LOGGING_REPORT: FEATURE_GET,
    }
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What the client's device has: `migration_flags` (0: it cannot migrate), and whether it knows dirty pages."""

    migration_flags: int = 0
    dma_logging: bool = False


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """A request that passed all checks. `flags` and `argsz` as sent, `data` what came behind them, cut at argsz."""

    feature: Feature
    flags: int
    argsz: int
    data: bytes

    @property
    def get(self) -> bool:
        """The client wants the feature's data. With `probe`: it asks whether this could be had."""
        return bool(self.flags & FEATURE_GET)

    @property
    def set(self) -> bool:
        """The client gives the feature's data, or wants it done. With `probe`: it asks whether this could be."""
        return bool(self.flags & FEATURE_SET)

    @property
    def probe(self) -> bool:
        """Only a question: `reply()` is the whole answer, nothing may be done."""
        return bool(self.flags & FEATURE_PROBE)

    def reply(self, data: bytes | None = None) -> bytes:
        """The payload of a good reply: with `data` as the answer to a GET, or the request's own bytes."""
        if data is None:
            return DEVICE_FEATURE.pack(self.argsz, self.flags) + self.data
        return DEVICE_FEATURE.pack(DEVICE_FEATURE.size + len(data), self.flags) + data


def parse_feature(payload: bytes, offer: Offer) -> FeatureRequest:
    """Decode and check the payload of a DEVICE_FEATURE message.

    Raises ClientError. EINVAL: too short, unknown flag bit, GET with SET but without PROBE; then ENOTTY: the device
    does not have the feature; then EINVAL: a way that the feature has not, no way at all, argsz or message too short
    for it. MIG_PRECOPY_INFO is the kernel's exception: EINVAL, not ENOTTY, without PRE_COPY.
    """
    header = DEVICE_FEATURE.size
    if len(payload) < header:
        raise ClientError(f"DEVICE_FEATURE: {len(payload)} bytes are too short for its header of {header}")
    argsz, flags = DEVICE_FEATURE.unpack_from(payload)
    if argsz < header:
        raise ClientError(f"DEVICE_FEATURE: argsz {argsz} is below its header of {header}")
    number, ways = flags & FEATURE_ID_MASK, flags & (FEATURE_GET | FEATURE_SET)
    if unknown := flags & ~(FEATURE_ID_MASK | FEATURE_GET | FEATURE_SET | FEATURE_PROBE):
        raise ClientError(f"DEVICE_FEATURE {number}: unknown flags {unknown:#x}")
    probe = bool(flags & FEATURE_PROBE)
    if ways == FEATURE_GET | FEATURE_SET and not probe:
        raise ClientError(f"DEVICE_FEATURE {number}: GET and SET exclude each other, but for PROBE")
    feature = _offered(number, offer)
    if ways & ~_WAYS[feature]:
        raise ClientError(f"DEVICE_FEATURE {feature.name}: has no {'GET' if ways & FEATURE_GET else 'SET'}")
    data = bytes(payload[header:argsz])
    if not probe:
        _check_room(feature, ways, argsz - header, len(data))
    return FeatureRequest(feature, flags, argsz, data)


def _offered(number: int, offer: Offer) -> Feature:
    if number == Feature.MIG_PRECOPY_INFO:
        if not offer.migration_flags & MIGRATION_PRE_COPY:
            raise ClientError("DEVICE_FEATURE MIG_PRECOPY_INFO: this device does not offer PRE_COPY")
        return Feature.MIG_PRECOPY_INFO
    if (number in _MIGRATION and offer.migration_flags) or (number in _LOGGING and offer.dma_logging):
        return Feature(number)
    known = Feature(number).name if number in frozenset(Feature) else "unknown"
    raise ClientError(f"DEVICE_FEATURE {number} ({known}): this device does not have it", errno.ENOTTY)


def _check_room(feature: Feature, ways: int, room: int, sent: int) -> None:
    if not ways:
        raise ClientError(f"DEVICE_FEATURE {feature.name}: neither GET nor SET nor PROBE")
    needed = _ROOM.get(feature, 0)
    if feature is Feature.MIG_PRECOPY_INFO and ways & FEATURE_GET:
        needed = FEATURE_PRECOPY_INFO.size
    if room < needed:
        raise ClientError(f"DEVICE_FEATURE {feature.name}: argsz leaves {room} bytes for data of {needed}")
    if ways & _SENT.get(feature, 0) and sent < needed:
        raise ClientError(f"DEVICE_FEATURE {feature.name}: {sent} bytes of data came, {needed} are needed")


# --- migration


def migration_reply(request: FeatureRequest, flags: int) -> bytes:
    """Answer GET MIGRATION."""
    return request.reply(FEATURE_MIGRATION.pack(flags))


def wanted_state(request: FeatureRequest) -> int:
    """The number that SET MIG_DEVICE_STATE asks for: any 32 bits. The data fd of the request means nothing here."""
    state: int = FEATURE_STATE.unpack_from(request.data)[0]
    return state


def state_reply(request: FeatureRequest, state: MigState) -> bytes:
    """Answer GET or SET MIG_DEVICE_STATE. There is never a data fd: MIG_DATA_READ and MIG_DATA_WRITE take its place."""
    return request.reply(FEATURE_STATE.pack(state, NO_DATA_FD))


def data_size_reply(request: FeatureRequest, stop_copy_length: int) -> bytes:
    """Answer GET MIG_DATA_SIZE: the bytes that a STOP_COPY would give now, an estimate."""
    return request.reply(FEATURE_DATA_SIZE.pack(max(0, min(stop_copy_length, ADDRESS_SPACE - 1))))


def precopy_info_reply(request: FeatureRequest, info: PrecopyInfo, *, with_flags: bool) -> bytes:
    """Answer GET MIG_PRECOPY_INFO. `with_flags`: the client has asked for valid flags (SET of the same feature)."""
    flags = PRECOPY_INFO_REINIT if info.reinit and with_flags else 0
    sizes = (max(0, min(size, ADDRESS_SPACE - 1)) for size in (info.initial_bytes, info.dirty_bytes))
    return request.reply(FEATURE_PRECOPY_INFO.pack(FEATURE_PRECOPY_INFO.size, flags, *sizes))


# --- DMA logging


@dataclass(frozen=True, slots=True)
class LoggingStart:
    """DMA_LOGGING_START: the page size wished for (the reply tells the real one) and the `(iova, length)` to watch.

    No ranges: everything (vfio-user's rule; the kernel's ioctl refuses it).
    """

    page_size: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LoggingReport:
    """DMA_LOGGING_REPORT: what was written of `[iova, iova + length)`; bit k stands for `iova + k * page_size`."""

    iova: int
    length: int
    page_size: int

    @property
    def bitmap_size(self) -> int:
        """Bytes of the bitmap that is answered: whole 64-bit words."""
        pages = -(-self.length // self.page_size)
        return -(-pages // 64) * 8


def parse_logging_start(request: FeatureRequest) -> LoggingStart:
    """Decode and check SET DMA_LOGGING_START.

    Raises ClientError. EINVAL: page size below 4 KiB or no power of two, ranges that did not come, are empty, not
    aligned to the page size or overlap. E2BIG: more than MAX_LOGGING_RANGES. EOVERFLOW: a range runs over the end of
    addresses.
    """
    page_size, count, _reserved = FEATURE_LOGGING_START.unpack_from(request.data)
    _check_page_size("DMA_LOGGING_START", page_size)
    if count > MAX_LOGGING_RANGES:
        raise ClientError(f"DMA_LOGGING_START: {count} ranges, at most {MAX_LOGGING_RANGES} are taken", errno.E2BIG)
    body = memoryview(request.data)[FEATURE_LOGGING_START.size :]
    if len(body) < count * LOGGING_RANGE.size:
        raise ClientError(f"DMA_LOGGING_START: {count} ranges announced, {len(body)} bytes of them came")
    ranges = tuple(LOGGING_RANGE.iter_unpack(body[: count * LOGGING_RANGE.size]))
    for iova, length in ranges:
        if length == 0 or iova % page_size or length % page_size:
            raise ClientError(
                f"DMA_LOGGING_START: range {iova:#x}+{length:#x} is empty or not aligned to pages of {page_size:#x}"
            )
        _check_overflow("DMA_LOGGING_START", iova, length)
    _check_overlap(sorted(ranges))
    return LoggingStart(page_size, ranges)


def _check_overlap(ordered: Sequence[tuple[int, int]]) -> None:
    for (before, length), (after, _) in pairwise(ordered):
        if before + length > after:
            raise ClientError(f"DMA_LOGGING_START: range {before:#x}+{length:#x} overlaps the one at {after:#x}")


def logging_start_reply(request: FeatureRequest, page_size: int) -> bytes:
    """Answer SET DMA_LOGGING_START: the request's bytes with the page size that is really used."""
    _wished, count, reserved = FEATURE_LOGGING_START.unpack_from(request.data)
    start = FEATURE_LOGGING_START.pack(page_size, count, reserved)
    return request.reply()[: DEVICE_FEATURE.size] + start + request.data[FEATURE_LOGGING_START.size :]


def parse_logging_report(request: FeatureRequest, max_bitmap: int) -> LoggingReport:
    """Decode and check GET DMA_LOGGING_REPORT; `max_bitmap`: the bytes of bitmap that one reply may carry.

    Raises ClientError. EINVAL: page size below 4 KiB or no power of two, no length, argsz without room for the bitmap.
    EOVERFLOW: the range runs over the end of addresses. E2BIG: the bitmap is larger than a reply may be.
    """
    report = LoggingReport(*FEATURE_LOGGING_REPORT.unpack_from(request.data))
    _check_page_size("DMA_LOGGING_REPORT", report.page_size)
    if report.length == 0:
        raise ClientError(f"DMA_LOGGING_REPORT: an empty range at {report.iova:#x}")
    _check_overflow("DMA_LOGGING_REPORT", report.iova, report.length)
    needed = DEVICE_FEATURE.size + FEATURE_LOGGING_REPORT.size + report.bitmap_size
    if report.bitmap_size > max_bitmap:
        raise ClientError(
            f"DMA_LOGGING_REPORT: a bitmap of {report.bitmap_size} bytes for {report.iova:#x}+{report.length:#x}, "
            f"at most {max_bitmap} fit into a reply: ask for smaller ranges",
            errno.E2BIG,
        )
    if request.argsz < needed:
        raise ClientError(f"DMA_LOGGING_REPORT: argsz {request.argsz} leaves no room for a reply of {needed} bytes")
    return report


def logging_report_reply(request: FeatureRequest, bitmap: bytes | bytearray | memoryview) -> bytes:
    """Answer GET DMA_LOGGING_REPORT: the request's range, then the bitmap."""
    report = request.data[: FEATURE_LOGGING_REPORT.size]
    head = DEVICE_FEATURE.pack(DEVICE_FEATURE.size + len(report) + len(bitmap), request.flags)
    return b"".join((head, report, bitmap))  # it is large: copied once


def _check_page_size(what: str, page_size: int) -> None:
    if page_size < PAGE_SIZE or page_size & (page_size - 1):
        raise ClientError(f"{what}: page size {page_size:#x} is no power of two of at least {PAGE_SIZE:#x}")


def _check_overflow(what: str, iova: int, length: int) -> None:
    # The kernel's check_add_overflow on 64 bits: a range that ends with the last address is refused as well.
    if iova + length >= ADDRESS_SPACE:
        raise ClientError(f"{what}: range {iova:#x}+{length:#x} runs over the end of addresses", errno.EOVERFLOW)
