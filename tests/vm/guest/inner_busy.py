"""Checks in the test machine that a machine inside it moves with edu under kernel VFIO: `inner_busy.py`.

Two functions, a server for each. The guest is the check itself, then Linux with a program that keeps the device busy
and compares every byte and every interrupt (tests/vm/inner/busy_init.c).
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.qemu_migration.edu_guest import BAR, BUFFER, MAILBOX, MESSAGE, PAGE, begin, copy, finish, set_up
from tests.qemu_migration.side import SLOT, Side
from tests.server.programs import Server
from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS
from tests.vm.guest.inner_moves import PATCHED, SECONDS, Moving, digest, keep_moving, linux, machine, served_at
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.served import serve, socket_of

checks.SECONDS = CHECK_SECONDS
MOVES, ROUNDS = 20, 3
FAULT = r"DMAR:.*(fault addr|DMA (Read|Write))"
HERE, THERE = 0x200000, 0x500000
CHANCE = random.Random(11)

running: dict[str, Server] = {}


def servers() -> list[Server]:
    """One for each function."""
    found = pci.find(pci.EDU)
    equal(len(found), 2, "functions")
    for bdf in found:
        if bdf not in running:
            pci.bind(bdf)
            running[bdf] = serve(bdf, "--dirty-tracking", "all")
    return [running[bdf] for bdf in found]


def give_up() -> str:
    """End the servers; their logs."""
    logs = ""
    while running:
        bdf, server = running.popitem()
        server.process.kill()
        server.wait(SECONDS)
        logs += f"the log of {bdf}'s server:\n{server.log}"
    return logs


@contextmanager
def moving(name: str) -> Iterator[Moving]:
    """A machine whose processor is the check, with edu set up; no fault in the IOMMU meanwhile."""
    log = KernelLog()
    with machine(name, PATCHED, [served_at(socket_of(bdf)) for bdf in pci.find(pci.EDU)], servers()) as made:
        set_up(made.side.guest)
        yield made
    equal([line for line in log.new() if re.search(FAULT, line)], [], "faults in the IOMMU")
    log.close()


def check_config_registers_buffer_and_memory_arrive() -> None:
    before: list[object] = []

    def compare(here: Side, there: Side) -> None:
        equal(digest(there), digest(here), "the guest's memory, all of it")

    with moving("edu-by-hand") as guest:
        for _ in range(4):
            one, data = guest.side.guest, CHANCE.randbytes(PAGE)
            one.write(BAR + 4, 4, CHANCE.getrandbits(32))
            one.store(HERE, data)
            copy(one, HERE, THERE, PAGE)
            before = [one.config_read(SLOT, at, 4) for at in range(0, 256, 4)] + [one.read(BAR + 4, 4)]
            guest.move(compare)
            one = guest.side.guest
            after = [one.config_read(SLOT, at, 4) for at in range(0, 256, 4)] + [one.read(BAR + 4, 4)]
            equal(after, before, "config space and a register")
            equal(one.load(THERE, PAGE) == data, True, "what was copied before")
            one.store(THERE, bytes(PAGE))
            begin(one, BUFFER, THERE, PAGE, out=True)
            finish(one)
            equal(one.load(THERE, PAGE) == data, True, "the device's buffer")
        guest.report()


def check_a_transfer_in_flight() -> None:
    with moving("edu-in-flight") as guest:
        data = CHANCE.randbytes(PAGE)
        guest.side.guest.store(HERE, data)
        begin(guest.side.guest, HERE, BUFFER, PAGE, out=False)
        finish(guest.side.guest)
        for _ in range(4):
            one = guest.side.guest
            one.store(THERE, bytes(PAGE))
            begin(one, BUFFER, THERE, PAGE, out=True)
            guest.move()
            finish(guest.side.guest)
            equal(guest.side.guest.load(THERE, PAGE) == data, True, "what the transfer has written")


def check_a_pending_interrupt() -> None:
    with moving("edu-pending") as guest:
        for cause in (0x2, 0x40):
            guest.side.guest.write(BAR + 0x60, 4, cause)
            guest.move()
            one = guest.side.guest
            equal((one.read(MAILBOX, 4), one.read(BAR + 0x24, 4)), (MESSAGE, cause), "message and cause")
            one.write(BAR + 0x64, 4, cause)
            one.write(MAILBOX, 4, 0)


def check_guest_at_work() -> None:
    log = KernelLog()
    places = [served_at(socket_of(bdf)) for bdf in pci.find(pci.EDU)]
    with linux("edu-busy", PATCHED, places, "busy", servers()) as guest:
        progress = keep_moving(guest, MOVES, ROUNDS)
    again = progress.figures["interrupts"] - 2 * progress.rounds
    print(
        f"report: rounds {progress.rounds}, of two transfers each; interrupts signalled once more {again}", flush=True
    )
    # edu's state cannot tell whether one that is pending was delivered, so it is signalled once more after a move.
    equal((0 <= again <= MOVES, progress.figures["idle"] <= again), (True, True), f"interrupts: {progress}")
    equal([line for line in log.new() if re.search(FAULT, line)], [], "faults in the IOMMU")
    log.close()


def check_the_servers_end_well() -> None:
    servers()
    while running:
        bdf, server = running.popitem()
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), f"{bdf}: {server.log}")


checks.run(globals(), give_up)
