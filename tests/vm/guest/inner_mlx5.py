"""Checks in the test machine that a machine inside it moves with a ConnectX function: `inner_mlx5.py`.

PF and VF are our model's, plugged in from outside, under kernel VFIO; a server for each VF, which drives the PF. QEMU
copies memory by what the firmware's page tracker says. The guest is the check itself: the model's own traffic.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from plugins.mlx5.models.traffic import Traffic
from tests.qemu_migration.side import Side
from tests.vm.guest import checks
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS
from tests.vm.guest.inner_moves import PATCHED, Moving, digest, machine, served_at
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.pairs import Pairs
from tests.vm.guest.qtest_guest import Port, QtestGuest
from tests.vm.guest.served import IOVA, socket_of

checks.SECONDS = CHECK_SECONDS
VENDOR, PF, VF = 0x15B3, 0x1021, 0x101E
MEMORY = "4M"
"""Every page of it is a message to the model, at each map."""
FRAMES, MOVES = 30, 10
FAULT = r"DMAR:.*(fault addr|DMA (Read|Write))"

pairs = Pairs("mlx5", (VENDOR, VF), (VENDOR, PF), "vf=0")


@contextmanager
def moving(name: str) -> Iterator[tuple[Moving, QtestGuest, Traffic]]:
    """A machine with the VF at work; no fault in the IOMMU meanwhile."""
    vfs = pairs.servers()
    log = KernelLog()
    places = [served_at(socket_of(bdf)) for bdf in vfs]
    with machine(name, PATCHED, places, [pairs.running[bdf] for bdf in vfs], memory=MEMORY) as made:
        guest = QtestGuest.started(made.side.guest)
        traffic = Traffic(Port(guest), base=IOVA)
        traffic.start()
        traffic.run(FRAMES)
        yield made, guest, traffic
    equal([line for line in log.new() if re.search(FAULT, line)], [], "faults in the IOMMU")
    log.close()


def work(traffic: Traffic) -> None:
    """Frames while memory is copied and the firmware tracks pages, and some for the moment of the stop."""
    for _ in range(3):
        traffic.run(FRAMES)
    traffic.post(FRAMES // 2)


def check_both_pairs_are_served() -> None:
    equal(len(pairs.servers()), 2, "VFs, each with a server")


def check_config_and_memory_arrive() -> None:
    def compare(here: Side, there: Side) -> None:
        equal(digest(there), digest(here), "the guest's memory, all of it")

    with moving("connectx-at-rest") as (made, guest, traffic):
        for _ in range(2):
            before = [guest.config.read(at, 4) for at in range(0, 256, 4)]
            made.move(compare)
            guest = guest.at(made.side.guest)
            equal([guest.config.read(at, 4) for at in range(0, 256, 4)], before, "config space")
            traffic.moved(Port(guest))
            traffic.run(FRAMES)


def check_there_and_back_with_frames_under_way() -> None:
    with moving("connectx-under-load") as (made, guest, traffic):
        for _ in range(MOVES):
            made.move(meanwhile=lambda: work(traffic))
            guest = guest.at(made.side.guest)
            traffic.moved(Port(guest))
            traffic.finish()
            traffic.run(FRAMES)
        made.report()
        (lane,) = traffic.lanes
        equal(lane.received, lane.sent, "frames, each received once")
        print(f"report: frames sent, and each received once: {lane.received}", flush=True)


def check_the_servers_end_well() -> None:
    pairs.servers()
    pairs.end()


checks.run(globals(), pairs.give_up)
