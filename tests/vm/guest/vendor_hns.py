"""Checks in the test machine that a ZIP accelerator moves under kernel VFIO: `vendor_hns.py group|cdev`.

PF and VF are our model's, plugged in from outside; the kernel has them behind its IOMMU. The model's own traffic goes
on while the VF moves there and back. The way into VFIO is the one that the kernel has.
"""

import re
import sys
from pathlib import Path

from plugins.hns.models.traffic import Traffic
from plugins.hns.registers import VENDOR, ZIP
from tests.vm.guest import checks
from tests.vm.guest.checks import equal
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.pairs import Pairs
from tests.vm.guest.served import IOVA, SECONDS
from vfu_server.testing import migrate_guest, save
from vfu_server.uapi import MigState

DOOR = sys.argv[1]
QUEUES, DEPTH, SIZE = 3, 8, 512
MEMORY = 128 << 10
ENTRIES = 30
FAULT = r"DMAR:.*(fault addr|DMA (Read|Write))"

pairs = Pairs("hns", (VENDOR, ZIP.vf_id), (VENDOR, ZIP.pf_id))


def traffic_of(guest) -> Traffic:
    """Copy, deflate and inflate, a queue each."""
    made = Traffic(guest, queues=QUEUES, depth=DEPTH, size=SIZE, start=IOVA, timeout=SECONDS)
    equal(made.end <= IOVA + MEMORY, True, "the memory is enough")
    return made


def check_both_pairs_are_served() -> None:
    for bdf in pairs.servers():
        pid = pairs.running[bdf].process.pid
        opened = {path.readlink().name for path in Path(f"/proc/{pid}/fd").iterdir()}
        way = {"group": "vfio", "cdev": "iommu"}[DOOR]
        equal(way in opened, True, f"/dev/.../{way} is among {sorted(opened)}")


def check_there_and_back_under_load() -> None:
    with pairs.guests(MEMORY, IOVA) as (here, there):
        log = KernelLog()
        traffic = traffic_of(here)
        traffic.run_entries(ENTRIES)
        for _ in range(2):
            traffic.submit()
            record = migrate_guest(here, there)
            print(f"{record}")
            traffic.move(there, there.interrupts)
            # As a new machine that waits for somebody: out of its last state, without the old guest's rings.
            here.machine_reset()
            here, there = there, here
            traffic.run_entries(ENTRIES)
        count = traffic.finish()
        equal((count.submitted, count.in_flight), (count.completed, 0), "entries, each completed once")
        equal(count.completed >= 3 * ENTRIES, True, f"{count}")
        traffic.driver.stop()
        equal([line for line in log.new() if re.search(FAULT, line)], [], "faults in the IOMMU")
        log.close()
        print(f"report: entries submitted, and each completed once: {count.completed}")


def check_a_migration_that_is_given_up_loses_nothing() -> None:
    with pairs.guests(MEMORY, IOVA) as (here, _):
        traffic = traffic_of(here)
        for state in (MigState.STOP, MigState.STOP_COPY):
            traffic.run_entries(ENTRIES)
            traffic.submit()
            here.client.set_mig_state(state)
            if state is MigState.STOP_COPY:
                equal(len(b"".join(save(here.client))) > 0, True, "a state")
            here.client.set_mig_state(MigState.RUNNING)
        traffic.run_entries(ENTRIES)
        count = traffic.finish()
        equal((count.submitted, count.in_flight), (count.completed, 0), "entries, each completed once")


def check_the_servers_end_well() -> None:
    pairs.servers()
    pairs.end()


checks.run(globals(), pairs.give_up)
