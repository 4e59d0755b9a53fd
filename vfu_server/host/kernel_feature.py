"""DEVICE_FEATURE on a real function: what vfio-user carries inline, the kernel wants behind pointers.

It translates layouts and decides nothing. Data goes in and comes out as `HostDevice.device_feature` has it.
"""

import errno
import os
import struct

from vfu_server import uapi
from vfu_server.host import ioctl as kernel_calls
from vfu_server.host.ioctl import Ioctl, address_of
from vfu_server.uapi import Feature

# vfio_device_feature_dma_logging_control: page_size, num_ranges, reserved, pointer to ranges
LOGGING_CONTROL = struct.Struct("=QIIQ")
# vfio_device_feature_dma_logging_report: iova, length, page_size, pointer to the bitmap
LOGGING_REPORT = struct.Struct("=QQQQ")
WORD = 8


def device_feature(ioctl: Ioctl, device_fd: int, flags: int, data: bytes, reply_size: int) -> bytes:
    """Make the call; OSError with the kernel's errno.

    A MIG_DEVICE_STATE that opens a data fd returns its number: it is the caller's to close.
    """
    number = flags & uapi.FEATURE_ID_MASK
    if flags & uapi.FEATURE_PROBE:
        return kernel_calls.device_feature(ioctl, device_fd, flags)
    if number == Feature.DMA_LOGGING_START:
        return _logging_start(ioctl, device_fd, flags, data)
    if number == Feature.DMA_LOGGING_REPORT:
        return _logging_report(ioctl, device_fd, flags, data, reply_size)
    if number == Feature.DMA_BUF:
        raise OSError(errno.ENOTTY, "DMA_BUF answers with a file descriptor, which has no place in the reply")
    return kernel_calls.device_feature(ioctl, device_fd, flags, data.ljust(reply_size, b"\0"))


def _logging_start(ioctl: Ioctl, device_fd: int, flags: int, data: bytes) -> bytes:
    head = uapi.FEATURE_LOGGING_START
    if len(data) < head.size:
        raise _invalid()
    page_size, count, _ = head.unpack_from(data)
    ranges = bytearray(data[head.size : head.size + count * uapi.LOGGING_RANGE.size])
    if len(ranges) != count * uapi.LOGGING_RANGE.size:
        raise _invalid()
    control = LOGGING_CONTROL.pack(page_size, count, 0, address_of(ranges))
    answered = kernel_calls.device_feature(ioctl, device_fd, flags, control)
    return answered[: head.size] + bytes(ranges)


def _logging_report(ioctl: Ioctl, device_fd: int, flags: int, data: bytes, reply_size: int) -> bytes:
    head = uapi.FEATURE_LOGGING_REPORT
    if len(data) < head.size:
        raise _invalid()
    iova, length, page_size = head.unpack_from(data)
    if not page_size:
        raise _invalid()
    pages = -(-length // page_size)
    size = -(-pages // (8 * WORD)) * WORD
    room = reply_size - head.size
    if room < -(-pages // 8):
        raise _invalid()
    bitmap = bytearray(size)
    report = LOGGING_REPORT.pack(iova, length, page_size, address_of(bitmap))
    kernel_calls.device_feature(ioctl, device_fd, flags, report)
    return bytes(data[: head.size]) + bytes(bitmap[:room].ljust(room, b"\0"))


def merge_dirty(ioctl: Ioctl, device_fd: int, iova: int, length: int, page_size: int, bits: memoryview) -> None:
    """See DirtyDoor.merge_dirty: the driver sets bits in the caller's bitmap and clears none. OSError."""
    if len(bits) < -(-length // (page_size * 8 * WORD)) * WORD:
        raise _invalid()
    report = LOGGING_REPORT.pack(iova, length, page_size, address_of(bits))
    kernel_calls.device_feature(ioctl, device_fd, uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT, report)


def _invalid() -> OSError:
    return OSError(errno.EINVAL, os.strerror(errno.EINVAL))
