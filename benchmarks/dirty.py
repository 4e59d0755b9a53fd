"""Dirty pages: a terabyte of guest memory in pages of 4 KiB, out of the IOMMU's tables, in as many reports as it takes.

The real path from the decoded request to the reply's bytes: the session's log over the kernel door's, over a stand-in
for the one ioctl that copies the bits out of the hardware's table, as the peer does.
"""

import ctypes
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import trio

from benchmarks.machine import Machine
from benchmarks.native_build import program
from benchmarks.processes import TREE, BenchmarkError, python
from benchmarks.rounds import interleaved
from benchmarks.rows import Goal, Row, compared
from vfu_server import feature, uapi
from vfu_server.feature import LoggingReport, LoggingStart
from vfu_server.host import ioctl
from vfu_server.host.kernel_dirty import IommuLog
from vfu_server.host_device import DmaMap, HostDevice
from vfu_server.session_dirty import DirtyLog
from vfu_server.session_memory import ClientMemory

TERABYTE = 1 << 40
PAGE = uapi.PAGE_SIZE
REPORT = (uapi.MAX_DATA_XFER_SIZE - 4096) // 4096 * 4096
"""Bytes of bitmap in one report: what a transfer has room for beside its headers."""
RANGE = REPORT * 8 * PAGE
REPORTS = -(-TERABYTE // RANGE)
GOAL = Goal(1.5)
NAME = f"dirty pages of 1 TiB, 4 KiB each, in {REPORTS} reports"


class _Iommu:
    """The ioctl door: a table whose bits are copied out."""

    def __init__(self) -> None:
        self._hardware = (ctypes.c_char * REPORT).from_buffer(bytearray(b"\x11" * REPORT))

    def __call__(self, fd: int, request: int, argument: bytearray | int) -> int:
        if request == ioctl.IOMMU_HWPT_GET_DIRTY_BITMAP and isinstance(argument, bytearray):
            fields = ioctl.HWPT_GET_DIRTY_BITMAP.unpack(argument)
            length, page_size, at = fields[-3:]
            ctypes.memmove(at, self._hardware, length // page_size // 8)
        return 0


class _Host:
    """What the session's log asks of a device's side."""

    def __init__(self, maps: Callable[[int, int], Sequence[DmaMap]]) -> None:
        self._log = IommuLog(_Iommu(), 0, 0, maps)

    async def device_feature(self, flags: int, data: bytes = b"", reply_size: int = 0) -> bytes:
        return self._log.feature(flags, data, reply_size)

    async def merge_dirty(self, iova: int, length: int, page_size: int, bits: memoryview) -> None:
        self._log.merge(iova, length, page_size, bits)


class _Memory:
    """One map: all of the guest's memory."""

    def __init__(self) -> None:
        self._maps = [DmaMap(0, TERABYTE, uapi.DMA_FLAG_READ | uapi.DMA_FLAG_WRITE, fd=0)]

    def writable(self, iova: int, length: int) -> Sequence[DmaMap]:
        return self._maps

    def watch_unmaps(self, watcher: Callable[[Sequence[DmaMap]], Awaitable[None]] | None) -> None:
        return None


async def tell() -> float:
    """Seconds for all reports."""
    memory = _Memory()
    log = DirtyLog(cast("HostDevice", _Host(memory.writable)), "auto", cast("ClientMemory", memory))
    await log.find_source()
    await log.start(LoggingStart(PAGE, ((0, TERABYTE),)))
    began = time.perf_counter()
    told = 0
    for iova in range(0, TERABYTE, RANGE):
        report = LoggingReport(iova, min(RANGE, TERABYTE - iova), PAGE)
        told += len(feature.logging_report_reply(_request(report), await log.report(report)))
    took = time.perf_counter() - began
    if told < TERABYTE // PAGE // 8:
        raise BenchmarkError(f"{told} bytes of bitmap were told")
    return took


def _request(report: LoggingReport) -> feature.FeatureRequest:
    """The message that asks for it, decoded."""
    argsz = uapi.DEVICE_FEATURE.size + uapi.FEATURE_LOGGING_REPORT.size + report.bitmap_size
    flags = uapi.FEATURE_GET | uapi.Feature.DMA_LOGGING_REPORT
    payload = uapi.DEVICE_FEATURE.pack(argsz, flags)
    payload += uapi.FEATURE_LOGGING_REPORT.pack(report.iova, report.length, report.page_size)
    return feature.parse_feature(payload, feature.Offer(uapi.MIGRATION_STOP_COPY, True))


def measure(machine: Machine, rounds: int, _where: Path) -> Iterator[Row]:
    """One row. Ours runs in a process of its own, so that both are bound alike."""
    ours_command = machine.bound(python("-m", "benchmarks.dirty"))
    peer_command = machine.bound([str(program("bitmap")), str(REPORTS), str(REPORT), "1"])
    ours, peer = interleaved(rounds, lambda: _seconds(ours_command), lambda: _seconds(peer_command))
    yield compared(NAME, "ms", [1e3 * one for one in ours], [1e3 * one for one in peer], GOAL)


def _seconds(command: Sequence[str]) -> float:
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return int(done.stdout) / 1e9


def main() -> None:
    """The best of a few: the first ones warm caches up, as the peer's memset does."""
    print(int(min(trio.run(tell) for _ in range(3)) * 1e9))


if __name__ == "__main__":
    main()
