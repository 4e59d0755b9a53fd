"""The server under test for accesses: the product's Context on a file in the place of a device, and nothing else.

    python -m benchmarks.ours SOCKET FILE [--busy PROCESSOR] [--memory]

The file is passed through by the kernel door's pread and pwrite, as the peer's is. Region 0 has a page for each answer.
"""

import argparse
import os
import socket
import sys
import threading

import trio

from vfu_server.host_device import IrqInfo, RegionInfo
from vfu_server.libvfio_user.context import Context, Disconnected
from vfu_server.libvfio_user.door import LocalMemory, NativeDoor
from vfu_server.libvfio_user.kernel_door import KernelDoor
from vfu_server.policy import WIDTH_ANY, WIDTHS_REGISTER, Answer, Answers, Policy, Rule
from vfu_server.region import MmapMode, compile_rules
from vfu_server.uapi import RegionIndex

REGION_SIZE = 64 << 10
RANGE = 4096
ANSWERS = (Answer.PASS, Answer.SHADOW, Answer.DISCARD, Answer.REFUSE, Answer.TRAP)
"""Answer of each page of region 0, in this order; the page's number times RANGE is its offset."""
SLICE = 1e-4
"""The product's switch interval, in seconds (see server.py)."""


class Traps:
    """The cheapest plugin method there is."""

    def trap_read(self, region: int, offset: int, width: int) -> int:
        """A constant."""
        return 42

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        """Nothing."""

    def trap_read_block(self, region: int, offset: int, length: int) -> bytes:
        """Zeros."""
        return bytes(length)

    def trap_write_block(self, region: int, offset: int, data: bytes) -> None:
        """Nothing."""


def open_door(file: str) -> NativeDoor:
    """A file in the place of the device."""
    fd = os.open(file, os.O_RDWR)
    door = KernelDoor(fd, fd)
    door.set_region(0, 0, REGION_SIZE)
    return door


def build(door: NativeDoor) -> Context:
    """The device: region 0 with all answers, config space."""
    rules = [
        Rule(0, i * RANGE, RANGE, Answers.always(answer), Answers.always(answer), answer.name)
        for i, answer in enumerate(ANSWERS)
    ]
    config = Answers.always(Answer.DISCARD)
    rules.append(Rule(RegionIndex.CONFIG, 0, 256, config, config, "config", widths=WIDTHS_REGISTER | WIDTH_ANY))
    sizes = {0: REGION_SIZE, int(RegionIndex.CONFIG): 256}
    regions = [RegionInfo(index, sizes.get(index, 0), 3) for index in range(9)]
    return Context(
        name="bench",
        regions=regions,
        irqs=[IrqInfo(index, 0) for index in range(5)],
        flags=3,
        rules=compile_rules(Policy(rules), MmapMode.NEVER, sizes),
        door=door,
        traps=Traps(),
    )


def burn(processor: int) -> None:
    """A thread that never waits, on a processor of its own: what it takes from the others is the interpreter's lock."""
    os.sched_setaffinity(0, {processor})
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    n = 0
    while True:
        n += 1


async def serve(context: Context, path: str) -> None:
    """One client after another."""
    listener = trio.socket.from_stdlib_socket(socket.socket(socket.AF_UNIX))
    await listener.bind(path)
    listener.listen(8)
    print("ready", flush=True)
    while True:
        client, _ = await listener.accept()
        context.attach(client.detach())
        await until_gone(context)
        context.join()


async def until_gone(context: Context) -> None:
    """Take what the pump tells; nothing in this load needs an answer of Python."""
    while True:
        await trio.lowlevel.wait_readable(context.fileno())
        if any(isinstance(event, Disconnected) for event in context.events()):
            return


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("file")
    parser.add_argument("--busy", type=int, metavar="PROCESSOR", help="a Python thread there that never waits")
    parser.add_argument("--memory", action="store_true", help="DMA maps are made by mmap; no registers")
    arguments = parser.parse_args()
    sys.setswitchinterval(SLICE)
    # There is no IOMMU here: maps are made as the peer's library makes them, by mmap.
    context = build(LocalMemory() if arguments.memory else open_door(arguments.file))
    if arguments.busy is not None:
        threading.Thread(target=burn, args=(arguments.busy,), daemon=True).start()
    trio.run(serve, context, arguments.socket)


if __name__ == "__main__":
    main()
