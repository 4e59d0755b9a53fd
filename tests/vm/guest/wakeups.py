"""Checks in the test machine that the server sleeps while its device works: `wakeups.py COUNT`.

An nvme under the plugin vfio, its doorbells mapped: COUNT commands, each with two doorbells and one message. Nothing of
that passes through the server, so none of its threads may be switched to.
"""

import os
import select
import struct
import sys
import time
from pathlib import Path

from tests.server.programs import Server
from tests.vm.guest import checks, functions, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.nvme_driver import DEPTH, DOORBELLS, NvmeDriver
from tests.vm.guest.served import IOVA, MEMORY, SECONDS, serve, socket_of
from vfu_server.testing import Guest, GuestMemory
from vfu_server.uapi import PCI_VENDOR_ID, RegionIndex

COUNT = int(sys.argv[1])
GET_FEATURES, NUMBER_OF_QUEUES = 0x0A, 7
SETTLE = 150.0
"""Seconds until idle threads of trio's have ended: they wait 10 s for work."""
checks.SECONDS = 900


def switches(server: Server) -> dict[str, int]:
    """How often each thread of the server was switched to, of its own will or not."""
    found = {}
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        number = int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])
        found[f"{fields['Name'].strip()} {task.name}"] = number
    return found


def settle(server: Server) -> dict[str, int]:
    """The counts once they stand still: only the thread of trio and the pump are left, and both sleep."""
    deadline, before = time.monotonic() + SETTLE, switches(server)
    while True:
        select.select([], [], [], 1.0)
        now = switches(server)
        if now == before and len(now) == 2:
            return now
        if time.monotonic() > deadline:
            raise AssertionError(f"the server does not come to rest: {before}, then {now}")
        before = now


def drive(guest: Guest, driver: NvmeDriver, count: int) -> int:
    """Run `count` commands by mapped doorbells; the interrupts that came."""
    queue, (area, at) = driver.admin, guest._mapped(0, DOORBELLS, 4)
    eventfd = guest.interrupts.fds[0]
    os.set_blocking(eventfd, True)
    commands = [
        struct.pack("<BBHI16xQQ6I", GET_FEATURES, 0, n, 0, 0, 0, NUMBER_OF_QUEUES, *(0,) * 5) for n in range(DEPTH)
    ]
    interrupts = 0
    with memoryview(area) as whole, whole[at : at + 8].cast("I") as doorbells:
        for _ in range(count):
            guest.memory.write(queue.submission + 64 * queue.tail, commands[queue.tail])
            queue.tail = (queue.tail + 1) % DEPTH
            doorbells[0] = queue.tail
            interrupts += int.from_bytes(os.read(eventfd, 8), sys.byteorder)
            status = int.from_bytes(guest.memory.read(queue.completion + 16 * queue.head + 14, 2), "little")
            if status != queue.phase:
                raise AssertionError(f"completion status {status:#x}, phase {queue.phase}")
            queue.head = (queue.head + 1) % DEPTH
            queue.phase ^= not queue.head
            doorbells[1] = queue.head
    return interrupts


def check_no_wakeup_for_doorbells_interrupts_and_dma() -> None:
    bdf = functions.ready(pci.NVME)
    with serve(bdf, "--mmap", "all", plugin="vfio") as server:
        memory = GuestMemory.of(MEMORY, IOVA)
        with memory, Guest.connect(socket_of(bdf), memory, timeout=SECONDS) as guest:
            guest.start().enable_msix(1)
            driver = NvmeDriver(guest, IOVA, SECONDS)
            driver.start()
            before, began = settle(server), time.monotonic()
            interrupts = drive(guest, driver, COUNT)
            took, after = time.monotonic() - began, switches(server)
            print(f"report: {interrupts} interrupts, {2 * COUNT} doorbells, {took:.1f} s, {before} -> {after}")
            equal(interrupts, COUNT, "interrupts")
            equal(after, before, "switches to each thread of the server")
            guest.client.read(RegionIndex.CONFIG, PCI_VENDOR_ID, 2)
            equal(switches(server) != before, True, "a message wakes it, and this test sees that")


checks.run(globals())
