"""A policy read the slow way, byte by byte, and a Context over a recording device in the place of the hardware.

Nothing of the compiled table's walk is used here: rules are looked at one after another.
"""

import errno
import random
import threading
import time
from dataclasses import dataclass

from vfu_server.host_device import IrqInfo, RegionInfo
from vfu_server.libvfio_user.context import Context
from vfu_server.libvfio_user.kernel_door import KernelDoor
from vfu_server.libvfio_user.native import ffi
from vfu_server.policy import WIDTH_ANY, WIDTHS_REGISTER, Answer, Answers, Policy, Rule
from vfu_server.region import MmapMode, compile_rules
from vfu_server.uapi import DEVICE_FLAGS_PCI, RegionIndex

REGION_SIZE = 0x1000
SIZES = {0: REGION_SIZE, 2: REGION_SIZE, int(RegionIndex.CONFIG): 256}
SINGLE = (1, 2, 4, 8)


def never_all_ones(data):
    """So that a byte of the device's or the client's is not taken for a DISCARD's."""
    return data.replace(b"\xff", b"\x7f")


def refusal(error):
    """An error reply; not the bare number, which an Answer would be equal to."""
    return f"refused with {errno.errorcode[error]}"


def expected(rules, region, offset, width, write, state_class):
    """What is to be answered: an Answer, or a refusal."""
    covering = []
    for at in range(offset, offset + width):
        found = [rule for rule in rules if rule.region == region and rule.start <= at < rule.end]
        assert len(found) <= 1
        covering += found or [None]
    if covering[0] is None:
        return refusal(errno.EPERM)
    allowed = [
        rule is not None and bool(rule.widths & WIDTH_ANY or (width in SINGLE and rule.widths & width))
        for rule in covering
    ]
    if not all(allowed):
        return refusal(errno.EINVAL)
    answers = {(rule.write if write else rule.read)[state_class] for rule in covering}
    if len(answers) > 1:
        return refusal(errno.EINVAL)
    answer = answers.pop()
    if answer is Answer.REFUSE:
        return refusal(covering[0].errno)
    return Answer.PASS if answer is Answer.MMAP else answer


def random_rules(rng, region, size, number, answers=(*Answer,)):
    """`number` rules and gaps between some of them; neighbours answer alike now and then."""
    cuts = sorted(rng.sample(range(1, size), 2 * number - 1))
    edges = [0, *cuts]
    rules = []
    choices = [answer for answer in answers if answer is not Answer.MMAP]
    for i in range(number):
        start, end = edges[2 * i], edges[2 * i + 1]
        if i and rng.random() < 0.6:
            start = edges[2 * i - 1]  # no gap
        if rules and rng.random() < 0.3:
            read, write = rules[-1].read, rules[-1].write
        else:
            read, write = (Answers(*(rng.choice(choices) for _ in range(5))) for _ in range(2))
        widths = rng.choice([WIDTHS_REGISTER, WIDTHS_REGISTER | WIDTH_ANY, 4, 4 | 8, 1 | 2])
        error = rng.choice([errno.EPERM, errno.ENODEV, errno.EBUSY])
        rules.append(Rule(region, start, end - start, read, write, f"rule {i}", widths=widths, errno=error))
    return rules


@dataclass(frozen=True, slots=True)
class Reached:
    """One access that came to the device: when (monotonic, ns), in which thread, and its bytes."""

    time: int
    thread: int
    write: bool
    region: int
    offset: int
    data: bytes


class Device:
    """The kernel's place: reads give numbers that never come twice (as far as the width has room), all is recorded."""

    def __init__(self):
        self.log = []
        self.count = 0
        self._keep = [
            ffi.callback("int(int, unsigned long, void *)", lambda *_: -errno.ENOTTY),
            ffi.callback("long(int, void *, size_t, uint64_t)", self._read, error=-errno.EIO),
            ffi.callback("long(int, const void *, size_t, uint64_t)", self._write, error=-errno.EIO),
        ]
        self.calls = ffi.new("struct vs_kernel_calls *", self._keep)

    def next_bytes(self, width):
        self.count += 1
        number = self.count * 0x9E3779B97F4A7C15 % (1 << 64)
        return never_all_ones(number.to_bytes(8, "big") * (width // 8 + 1))[:width]

    def _note(self, write, offset, data):
        region, at = divmod(offset, 1 << 32)
        self.log.append(Reached(time.monotonic_ns(), threading.get_ident(), write, region, at, data))

    def _read(self, fd, buffer, count, offset):
        data = self.next_bytes(count)
        ffi.buffer(buffer, count)[:] = data
        self._note(False, offset, data)
        return count

    def _write(self, fd, buffer, count, offset):
        self._note(True, offset, bytes(ffi.buffer(buffer, count)))
        return count


class Traps:
    """A plugin's methods, recorded as the device's accesses are."""

    def __init__(self, device):
        self.device = device
        self.log = []

    def _note(self, write, region, offset, data):
        self.log.append(Reached(time.monotonic_ns(), threading.get_ident(), write, region, offset, bytes(data)))

    def trap_read(self, region, offset, width):
        return int.from_bytes(self.trap_read_block(region, offset, width), "little")

    def trap_write(self, region, offset, width, value):
        self.trap_write_block(region, offset, value.to_bytes(width, "little"))

    def trap_read_block(self, region, offset, length):
        data = self.device.next_bytes(length)
        self._note(False, region, offset, data)
        return data

    def trap_write_block(self, region, offset, data):
        self._note(True, region, offset, data)


class Presented:
    """The real pump and table with `rules`, over a recording device."""

    def __init__(self, rules):
        self.rules = rules
        self.device = Device()
        self.traps = Traps(self.device)
        self.door = KernelDoor(-1, -1, calls=self.device.calls)
        for region, size in SIZES.items():
            self.door.set_region(region, region << 32, size)
        self.context = Context(
            name="stress",
            regions=[RegionInfo(index, SIZES.get(index, 0), 3) for index in range(9)],
            irqs=[IrqInfo(index, 0) for index in range(5)],
            flags=DEVICE_FLAGS_PCI,
            rules=compile_rules(Policy(rules), MmapMode.NEVER, SIZES),
            door=self.door,
            traps=self.traps,
        )

    def close(self):
        self.context.close()
        self.door.close()


def policy_rules(seed, number=12):
    """Rules for all regions; config space is told as well, so that nothing is added."""
    rng = random.Random(seed)
    return [rule for region, size in SIZES.items() for rule in random_rules(rng, region, size, number)]
