"""A small device behind the real pump, its one client, and the test in the place of the session.

Messages that the pump hands up are answered by the test itself, when and as it likes: no loop runs beside it.
"""

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time

from vfu_server import uapi
from vfu_server.errors import VfuServerError
from vfu_server.host_device import IrqInfo, MmapArea, RegionInfo
from vfu_server.libvfio_user.context import Connected, Context, Disconnected, Message, Notice
from vfu_server.libvfio_user.door import LocalMemory
from vfu_server.policy import WIDTH_ANY, WIDTHS_REGISTER, Answer, Answers, Policy, Rule
from vfu_server.region import MmapMode, compile_rules, mmap_areas
from vfu_server.testing import Client
from vfu_server.uapi import Command, RegionIndex

BAR0_SIZE = 0x4000
REGISTERS = 0x0
"""BAR0: 0x0-0x1000 registers (TRAP), 0x1000-0x2000 mapped, 0x2000-0x3000 dropped, the rest is not declared."""
MAPPED = 0x1000
DROPPED = 0x2000
UNDECLARED = 0x3000
REG_SLOW = 0xF00
"""A read here waits until `Registers.gate` is set."""
REG_BROKEN = 0xF08
"""An access here fails with EXDEV."""
BAR2_SIZE = 2 << 20
"""BAR2 takes any width everywhere: memory of the device."""
FLR_BYTE, FLR_BIT = 0x49, 0x80


class Registers:
    """The trap target: bytes that keep what is written, and a log of (write, region, offset, width)."""

    def __init__(self):
        self.memory = {0: bytearray(0x1000), 2: bytearray(BAR2_SIZE), RegionIndex.CONFIG: bytearray(256)}
        self.log = []
        self.gate = threading.Event()
        self.entered = threading.Event()

    def trap_read(self, region, offset, width):
        self._note(False, region, offset, width)
        return int.from_bytes(self.memory[region][offset : offset + width], "little")

    def trap_write(self, region, offset, width, value):
        self._note(True, region, offset, width)
        self.memory[region][offset : offset + width] = value.to_bytes(width, "little")

    def trap_read_block(self, region, offset, length):
        self._note(False, region, offset, length)
        return bytes(self.memory[region][offset : offset + length])

    def trap_write_block(self, region, offset, data):
        self._note(True, region, offset, len(data))
        self.memory[region][offset : offset + len(data)] = data

    def _note(self, *access):
        self.log.append(access)
        _, region, offset, _ = access
        if region == 0 and offset == REG_SLOW:
            self.entered.set()
            self.gate.wait(5)
        if region == 0 and offset == REG_BROKEN:
            raise VfuServerError("broken", errno.EXDEV)


def policy():
    trap = Answers.always(Answer.TRAP)
    anything = WIDTHS_REGISTER | WIDTH_ANY
    drop = Answers.always(Answer.DISCARD)
    mapped = Answers.always(Answer.MMAP)
    return Policy(
        [
            Rule(0, REGISTERS, 0x1000, trap, trap, "registers"),
            Rule(0, MAPPED, 0x1000, mapped, mapped, "mapped", widths=anything),
            Rule(0, DROPPED, 0x1000, drop, drop, "dropped"),
            Rule(2, 0, BAR2_SIZE, trap, trap, "memory", widths=anything),
            Rule(RegionIndex.CONFIG, 0, 256, trap, trap, "config", widths=anything),
        ]
    )


class Served:
    """The device, its Context and door; `connect` gives clients."""

    def __init__(self, *, max_maps=65535, trace=None):
        self.registers = Registers()
        self.door = LocalMemory(max_maps)
        self.bar0 = os.memfd_create("bar0", os.MFD_CLOEXEC)
        os.ftruncate(self.bar0, BAR0_SIZE)
        self.notices = []
        self.messages = []
        self.faults = []
        self.ended = None
        self.connected = None
        self._poll = select.poll()
        readwrite = uapi.REGION_INFO_FLAG_READ | uapi.REGION_INFO_FLAG_WRITE
        regions = [
            RegionInfo(0, BAR0_SIZE, readwrite | uapi.REGION_INFO_FLAG_MMAP, (MmapArea(0, BAR0_SIZE),), self.bar0),
            RegionInfo(2, BAR2_SIZE, readwrite),
            RegionInfo(RegionIndex.CONFIG, 256, readwrite),
        ]
        sizes = {region.index: region.size for region in regions}
        areas = mmap_areas(policy(), regions, MmapMode.PLUGIN)
        regions[0] = RegionInfo(0, BAR0_SIZE, regions[0].flags, areas[0], self.bar0)
        noresize = uapi.IRQ_INFO_EVENTFD | uapi.IRQ_INFO_NORESIZE
        intx = uapi.IRQ_INFO_EVENTFD | uapi.IRQ_INFO_MASKABLE | uapi.IRQ_INFO_AUTOMASKED
        self.context = Context(
            name="served",
            regions=regions,
            irqs=[IrqInfo(0, 1, intx), IrqInfo(1, 4, noresize), IrqInfo(2, 32, uapi.IRQ_INFO_EVENTFD)],
            flags=uapi.DEVICE_FLAGS_PCI | uapi.DEVICE_FLAGS_RESET,
            rules=compile_rules(policy(), MmapMode.PLUGIN, sizes, areas),
            door=self.door,
            traps=self.registers,
            flr=[(FLR_BYTE, FLR_BIT)],
            trace=trace,
        )
        self._poll.register(self.context.fileno(), select.POLLIN)

    def close(self):
        self.registers.gate.set()
        self.context.close()
        self.door.close()
        os.close(self.bar0)

    # clients

    @contextlib.contextmanager
    def connect(self, *, negotiate=True, timeout=5.0, caps=None, minor=0):
        """A client of the device; at its end the connection is over and joined."""
        ours, theirs = socket.socketpair()
        self.ended = None
        self.context.attach(theirs.detach())
        with Client(ours, timeout=timeout) as client:
            if negotiate:
                client.negotiate(caps, minor)
            try:
                yield client
            finally:
                client.close()
                self.registers.gate.set()
                self.wait_ended()

    def wait_ended(self, timeout=8.0):
        """Wait for the end of the connection; its reason."""
        self.wait(lambda: self.ended is not None, timeout, "the end of the connection")
        self.context.join()
        for message in self.messages:
            for fd in message.fds:
                os.close(fd)
        self.messages.clear()
        return self.ended.reason

    # the session's part

    def take_events(self):
        for event in self.context.events():
            if isinstance(event, Message):
                self.messages.append(event)
            elif isinstance(event, Disconnected):
                self.ended = event
            elif isinstance(event, Connected):
                self.connected = event
            elif isinstance(event, Notice):
                self.notices.append(event.text)
            else:
                self.faults.append(event)

    def wait(self, condition, timeout=5.0, what="an event"):
        deadline = time.monotonic() + timeout
        while True:
            self.take_events()
            if condition():
                return
            left = deadline - time.monotonic()
            assert left > 0, f"waited for {what}; notices {self.notices}, messages {self.messages}"
            self._poll.poll(left * 1000)

    def message(self, command=None):
        """The one message that is up, taken; its fds are the test's to close."""
        self.wait(lambda: self.messages, what=f"message {command!r}")
        message = self.messages.pop(0)
        if command is not None:
            assert message.command == command
        return message

    def no_message(self):
        """Nothing has come up (what was sent before an answered message would have)."""
        self.take_events()
        return not self.messages

    def answer(self, client, command, payload=b"", fds=(), *, reply=b"", error=0):
        """Send a command that comes up, answer it, and return (what came up, what the client was told)."""
        msg_id = client.send_message(command, payload, fds)
        message = self.message(command)
        self.context.reply(reply, error)
        for fd in message.fds:
            os.close(fd)
        return message, client.wait_reply(msg_id)

    def settle(self, client):
        """All that the client sent before is served as far as it can be: a read behind it was answered."""
        client.read(0, REGISTERS, 4)
        self.take_events()

    def fds_after(self, client):
        """`fd_count` once the pump is done with the last message: it closes its fds only after it has answered."""
        self.settle(client)
        return fd_count()


def access(region, offset, count, data=b""):
    return uapi.REGION_ACCESS.pack(offset, region, count) + data


def wait_taken(client):
    """Until the server has read all that was sent; it gives no sign, so ask the kernel."""
    deadline = time.monotonic() + 5
    while struct.unpack("i", fcntl.ioctl(client.sock, termios.TIOCOUTQ, bytes(4)))[0]:
        assert time.monotonic() < deadline
        client.serve(0.001)


def fd_count():
    """How many fds this process has open, and with it the device."""
    return len(os.listdir("/proc/self/fd"))


def open_files():
    """What the open fds of this process are, for a message that says more than a number."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def resident():
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def deaf_feature(client):
    """A DEVICE_FEATURE that nobody answers yet: from now on the ordered kind is held."""
    return client.send_message(Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(8, 0x40000))
