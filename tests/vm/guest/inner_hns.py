"""Checks in the test machine that a machine inside it moves with a ZIP accelerator under kernel VFIO: `inner_hns.py`.

PF and VF are our model's, plugged in from outside; a server for each VF. The guest is the check itself: the model's own
traffic through QEMU.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from plugins.hns.models.traffic import Traffic
from plugins.hns.registers import VENDOR, ZIP
from tests.vm.guest import checks
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS
from tests.vm.guest.inner_moves import PATCHED, Moving, digest, machine, served_at
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.pairs import Pairs
from tests.vm.guest.qtest_guest import QtestGuest
from tests.vm.guest.served import IOVA, socket_of

checks.SECONDS = CHECK_SECONDS
QUEUES, DEPTH, SIZE = 3, 8, 512
MEMORY = "4M"
"""Every page of it is a message to the model, at each map."""
ENTRIES, MOVES = 30, 10
FAULT = r"DMAR:.*(fault addr|DMA (Read|Write))"

pairs = Pairs("hns", (VENDOR, ZIP.vf_id), (VENDOR, ZIP.pf_id), arguments=("--dirty-tracking", "all"))


@contextmanager
def moving(name: str) -> Iterator[tuple[Moving, QtestGuest, Traffic]]:
    """A machine with the VF at work; no fault in the IOMMU meanwhile."""
    vfs = pairs.servers()
    log = KernelLog()
    places = [served_at(socket_of(bdf)) for bdf in vfs]
    with machine(name, PATCHED, places, [pairs.running[bdf] for bdf in vfs], memory=MEMORY) as made:
        guest = QtestGuest.started(made.side.guest)
        traffic = Traffic(guest, queues=QUEUES, depth=DEPTH, size=SIZE, start=IOVA, halves=True, timeout=CHECK_SECONDS)
        traffic.run_entries(ENTRIES)
        yield made, guest, traffic
    equal([line for line in log.new() if re.search(FAULT, line)], [], "faults in the IOMMU")
    log.close()


def check_both_pairs_are_served() -> None:
    equal(len(pairs.servers()), 2, "VFs, each with a server")


def check_config_and_memory_arrive() -> None:
    def compare(here, there) -> None:
        equal(digest(there), digest(here), "the guest's memory, all of it")

    with moving("zip-at-rest") as (made, guest, traffic):
        for _ in range(2):
            traffic.finish()
            before = [guest.config.read(at, 4) for at in range(0, 256, 4)]
            made.move(compare)
            guest = guest.at(made.side.guest)
            equal([guest.config.read(at, 4) for at in range(0, 256, 4)], before, "config space")
            traffic.move(guest, guest.interrupts)
            traffic.run_entries(ENTRIES)


def check_there_and_back_under_load() -> None:
    with moving("zip-under-load") as (made, guest, traffic):
        flown = 0
        for _ in range(MOVES):
            traffic.submit()
            flown += traffic.count().in_flight
            made.move()
            guest = guest.at(made.side.guest)
            traffic.move(guest, guest.interrupts)
            traffic.run_entries(ENTRIES)
        count = traffic.finish()
        made.report()
        equal((count.submitted, count.in_flight), (count.completed, 0), "entries, each completed once")
        equal(flown > 0, True, "entries under way at moves")
        print(
            f"report: entries submitted, and each completed once: {count.completed}; with {flown} at moves", flush=True
        )
        traffic.driver.stop()


def check_the_servers_end_well() -> None:
    pairs.servers()
    pairs.end()


checks.run(globals(), pairs.give_up)
