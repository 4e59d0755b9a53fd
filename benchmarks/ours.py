"""The server under test: the product's Context on a file in the place of a device, with nothing else in the process.

    python -m benchmarks.ours SOCKET FILE STATE_BYTES [--busy] [--memory]

The register file is passed through by the kernel door's pread and pwrite, as the peer's is. Region 0 has a range for
each answer.
"""

import argparse
import os
import socket
import sys
import threading

import trio

from vfu_server.host_device import IrqInfo, RegionInfo
from vfu_server.libvfio_user.context import Connected, Context, Disconnected, Message
from vfu_server.libvfio_user.door import LocalMemory, NativeDoor
from vfu_server.libvfio_user.kernel_door import KernelDoor
from vfu_server.policy import WIDTH_ANY, WIDTHS_REGISTER, Answer, Answers, Policy, Rule
from vfu_server.region import MmapMode, compile_rules
from vfu_server.uapi import Command, RegionIndex

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


def burn() -> None:
    """A thread that never waits."""
    n = 0
    while True:
        n += 1


async def save(context: Context, size: int) -> None:
    """A producer in Python that yields 1 MiB buffers."""
    data = b"\x5a" * (1 << 20)
    for _ in range(0, size, len(data)):
        await context.ring.send(data)
    context.ring.finish()


async def load(context: Context) -> None:
    """A consumer that looks at nothing."""
    while await context.ring.receive() is not None:
        pass


async def answer(context: Context, message: Message, nursery: trio.Nursery, size: int) -> None:
    """State changes open the ring; maps without fd do not come."""
    if message.command is Command.DEVICE_FEATURE:
        if message.payload[8] == 3:
            context.ring.open_save(pre_copy=False)
            nursery.start_soon(save, context, size)
        else:
            context.ring.open_load()
            nursery.start_soon(load, context)
    context.reply(message.payload)


async def serve(context: Context, path: str, size: int) -> None:
    """One client after another."""
    listener = trio.socket.from_stdlib_socket(socket.socket(socket.AF_UNIX))
    await listener.bind(path)
    listener.listen(8)
    print("ready", flush=True)
    while True:
        client, _ = await listener.accept()
        context.attach(client.detach())
        async with trio.open_nursery() as nursery:
            ended = False
            while not ended:
                await trio.lowlevel.wait_readable(context.fileno())
                for event in context.events():
                    if isinstance(event, Message):
                        await answer(context, event, nursery, size)
                    ended = ended or isinstance(event, Disconnected)
                    if isinstance(event, Connected):
                        continue
            nursery.cancel_scope.cancel()
        context.join()
        context.ring.close()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("file")
    parser.add_argument("state_bytes", type=int)
    parser.add_argument("--busy", action="store_true", help="a Python thread that never waits runs beside it")
    parser.add_argument("--memory", action="store_true", help="DMA maps are made by mmap; no registers")
    arguments = parser.parse_args()
    sys.setswitchinterval(SLICE)
    # There is no IOMMU here: maps are made as the peer's library makes them, by mmap.
    context = build(LocalMemory() if arguments.memory else open_door(arguments.file))
    if arguments.busy:
        threading.Thread(target=burn, daemon=True).start()
    trio.run(serve, context, arguments.socket, arguments.state_bytes)


if __name__ == "__main__":
    main()
