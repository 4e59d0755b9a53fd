"""Checks in the test machine that examples/e1000e moves an 82574L under kernel VFIO: `example_e1000e.py group|cdev`.

QEMU's functions, each on a wire of its own; a station answers numbered frames on both. The client of the test kit is a
guest whose driver keeps rings in its memory and goes on while it is moved. The way into VFIO is the one that the kernel
has.
"""

import random
import re
import sys
import time
from pathlib import Path

from e1000e.registers import MAC
from e1000e.traffic import Traffic
from e1000e.wire import Station

from tests.vm.guest import checks, stations, wired
from tests.vm.guest.checks import equal
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.wired import UNTOUCHED, guests, traffic_of
from vfu_server.testing import migrate_guest, save
from vfu_server.uapi import MigState

DOOR = sys.argv[1]
ROUND_TRIPS, FRAMES, BURST = 10, 16, 8
FAULT = r"DMAR:.*(fault addr|DMA (Read|Write))"
PAGE = 4096


def each_once(traffic: Traffic, station: Station) -> None:
    """Every frame that the guest gave to its card reached the other end, once."""
    wrong = {number: times for number, times in station.seen.items() if times != 1}
    missing = [number for number in range(traffic.count.sent) if number not in station.seen]
    equal((wrong, missing), ({}, []), "frames that came more than once, and that never came")


def there_and_back(messages: str, round_trips: int) -> None:
    with stations.station() as station, guests() as (here, there):
        log = KernelLog()
        untouched = random.Random(1).randbytes(PAGE)
        here.memory.write(UNTOUCHED, untouched)
        traffic = traffic_of(here, messages)
        downtimes = []
        for _ in range(2 * round_trips):
            traffic.exchange(FRAMES)
            traffic.send(BURST)
            began = time.monotonic()
            migrate_guest(here, there)
            downtimes.append(time.monotonic() - began)
            traffic.move(there)
            # As a new machine that waits for somebody: out of its last state.
            here.machine_reset()
            here, there = there, here
            traffic.one_by_interrupt()
            traffic.exchange(FRAMES)
            equal(here.memory.read(UNTOUCHED, PAGE) == untouched, True, "memory that the card had no business with")
        count = traffic.count
        each_once(traffic, station)
        equal(count.sent, 2 * round_trips * (2 * FRAMES + BURST + 1), "frames sent")
        equal(count.lost <= 2 * round_trips * BURST, True, f"answers lost: {count.lost}, more than were on the wire")
        equal(count.interrupts > 0, True, "interrupts")
        equal(traffic.read("GPTC"), count.sent, "frames sent by the counter, which was never read before")
        equal(traffic.read("GPRC"), len(count.answers), "frames received by the counter")
        equal([line for line in log.new() if re.search(FAULT, line)], [], "faults in the IOMMU")
        log.close()
        print(
            f"report: {messages}: {2 * round_trips} moves, {count.sent} frames each sent once, {len(count.answers)} "
            f"answers, {count.lost} lost while it stood still, {count.interrupts} interrupts, "
            f"a move {min(downtimes):.2f} to {max(downtimes):.2f} s"
        )


def check_both_servers_start() -> None:
    for bdf in wired.servers():
        opened = {path.readlink().name for path in Path(f"/proc/{wired.running[bdf].process.pid}/fd").iterdir()}
        way = {"group": "vfio", "cdev": "iommu"}[DOOR]
        equal(way in opened, True, f"/dev/.../{way} is among {sorted(opened)}")
    equal(len(wired.running), 2, "functions, each with a server")


def check_there_and_back_with_msi() -> None:
    there_and_back("msi", ROUND_TRIPS)


def check_there_and_back_with_msix() -> None:
    there_and_back("msix", ROUND_TRIPS)


def check_there_and_back_with_intx() -> None:
    there_and_back("intx", 1)


def check_a_migration_that_is_given_up_loses_nothing() -> None:
    with stations.station() as station, guests() as (here, _):
        traffic = traffic_of(here, "msi")
        for state in (MigState.STOP, MigState.STOP_COPY):
            traffic.exchange(FRAMES)
            traffic.send(BURST)
            here.client.set_mig_state(state)
            if state is MigState.STOP_COPY:
                equal(len(b"".join(save(here.client))) > 0, True, "a state")
            here.client.set_mig_state(MigState.RUNNING)
            traffic.exchange(FRAMES)
        each_once(traffic, station)


def check_nothing_of_the_guest_is_left_behind() -> None:
    with guests() as (here, _):
        traffic = traffic_of(here, "msi")
        traffic.write("MTA[5].word", 0x12345678)
    with guests() as (here, _):
        for name in ("RCTL", "IMS", "RX[0].RDBAL", "TX[0].TDT", "MTA[5].word"):
            equal(here.read(0, MAC[name].offset, 4), 0, f"{name} after another guest")


def check_the_servers_end_well() -> None:
    wired.servers()
    wired.end()


checks.run(globals(), wired.give_up)
