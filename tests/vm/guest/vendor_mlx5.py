"""Checks in the test machine that a ConnectX function moves under kernel VFIO: `vendor_mlx5.py group|cdev`.

PF and VF are our model's, plugged in from outside; the kernel has them behind its IOMMU, and the PF is driven by the
plugin. Memory is copied by what the firmware's page tracker says. The way into VFIO is the one that the kernel has.
"""

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plugins.mlx5.models.traffic import AREA, Traffic
from tests.vm.guest import checks
from tests.vm.guest.checks import equal
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.pairs import Pairs
from tests.vm.guest.served import IOVA, SECONDS
from vfu_server.testing import Guest, migrate_guest
from vfu_server.uapi import MigState

DOOR = sys.argv[1]
VENDOR, PF, VF = 0x15B3, 0x1021, 0x101E
VECTORS = 8
FRAMES = 30
FAULT = r"DMAR:.*(fault addr|DMA (Read|Write))"

pairs = Pairs("mlx5", (VENDOR, VF), (VENDOR, PF), "vf=0")


class GuestPort:
    """The guest as a driver of the function's data path sees it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def read(self, region: int, offset: int, width: int) -> int:
        return self.guest.read(region, offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        self.guest.write(region, offset, width, value)

    def load(self, iova: int, length: int) -> bytes:
        return self.guest.memory.read(iova, length)

    def store(self, iova: int, data: bytes) -> None:
        self.guest.memory.write(iova, data)

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Serves the connection between two looks at the rings, which no interrupt tells of."""
        deadline = time.monotonic() + SECONDS
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come within {SECONDS:g} s")
            self.guest.client.serve(0.01)


def traffic_of(guest: Guest) -> Traffic:
    """Frames of one pair, in loopback."""
    guest.enable_msix(VECTORS)
    traffic = Traffic(GuestPort(guest), base=IOVA)
    traffic.start()
    return traffic


def work_once_the_log_is_kept(guest: Guest, traffic: Traffic) -> None:
    """Have frames come when the log has begun, and leave some under way when memory is copied after that."""
    plain = guest.client.dma_logging_start

    def working(ranges: Sequence[tuple[int, int]]) -> int:
        guest.client.dma_logging_start = plain
        page_size = plain(ranges)
        traffic.run(FRAMES)
        traffic.post(FRAMES // 2)
        return page_size

    guest.client.dma_logging_start = working


def check_both_pairs_are_served() -> None:
    for bdf in pairs.servers():
        pid = pairs.running[bdf].process.pid
        opened = {path.readlink().name for path in Path(f"/proc/{pid}/fd").iterdir()}
        way = {"group": "vfio", "cdev": "iommu"}[DOOR]
        equal(way in opened, True, f"/dev/.../{way} is among {sorted(opened)}")


def check_there_and_back_with_pre_copy() -> None:
    with pairs.guests(AREA, IOVA) as (here, there):
        log = KernelLog()
        traffic = traffic_of(here)
        traffic.run(FRAMES)
        for _ in range(2):
            work_once_the_log_is_kept(here, traffic)
            record = migrate_guest(here, there, pre_copy=True)
            equal(
                (record.pre_copy_bytes > 0, record.stop_copy_bytes > 0), (True, True), "state before and after the stop"
            )
            equal(record.memory_bytes > AREA, True, "memory that was copied again, by the log")
            traffic.moved(GuestPort(there))
            # As a new machine that waits for somebody: out of its last state, without the old guest's rings.
            here.machine_reset()
            here, there = there, here
            traffic.finish()
            traffic.run(FRAMES)
        equal(traffic.outstanding, 0, "frames that have not come back")
        equal([line for line in log.new() if re.search(FAULT, line)], [], "faults in the IOMMU")
        log.close()
        print(f"report: frames sent, and each received once: {traffic.lanes[0].received}")


def check_a_migration_that_is_given_up_leaves_the_guest_running() -> None:
    with pairs.guests(AREA, IOVA) as (here, _):
        traffic = traffic_of(here)
        traffic.run(FRAMES)
        for state in (MigState.PRE_COPY, MigState.STOP_COPY, MigState.RUNNING):
            here.client.set_mig_state(state)
        traffic.run(FRAMES)


def check_the_servers_end_well() -> None:
    pairs.servers()
    pairs.end()


checks.run(globals(), pairs.give_up)
