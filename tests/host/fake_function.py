"""A PCI function as vfio-pci presents it: regions, interrupts, resets, features, with the kernel's rules and errnos.

The rules are those of drivers/vfio/pci of Linux 6.12 as its user sees them. Real eventfds, real memory behind pointers.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Callable

OFFSETS = [0x10000, 0x40000, 0, 0x80000, 0, 0, 0x90000, 0xA0000, 0]
"""Where regions lie in the device fd: not where today's kernel puts them, and in no regular order."""
CONFIG = 7
MEMORY = 2
NONE, BOOL, EVENTFD = 1, 2, 4
MASK, UNMASK, TRIGGER = 8, 0x10, 0x20


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def load(pointer: int, size: int) -> bytes:
    return ctypes.string_at(pointer, size)


def store(pointer: int, data: bytes) -> None:
    ctypes.memmove(pointer, data, len(data))


def is_eventfd(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


class FakeFunction:
    """One function. `capabilities`: by region, (flags to add, id, data behind the header)."""

    def __init__(self, bdf: str = "0000:00:04.0", *, group: int = 7, msix: int = 8, msix_resizes: bool = True):
        self.bdf = bdf
        self.group = group
        self.sizes = [0x4000, 0x2000, 0, 0x1000, 0, 0, 0x800, 0x1000, 0]
        self.flags = [7, 7, 0, 3, 0, 0, 1, 3, 0]
        self.capabilities: dict[int, list[tuple[int, bytes]]] = {}
        self.memory = [bytearray(size) for size in self.sizes]
        self.irq_counts = [1, 16, msix, 1, 1]
        self.irq_flags = [7, 9, 1 if msix_resizes else 9, 9, 9]
        self.vectors_had = 1 << 16
        self.mode: int | None = None
        self.allocated = 0
        self.triggers: dict[tuple[int, int], int] = {}
        self.resample = -1
        self.masked = False
        self.calls: list[str] = []
        """What was done with it, in words."""
        self.accesses: list[tuple[str, int, int, int]] = []
        """(read or write, region, offset, width)."""
        self.resets = self.tells_reset = True
        self.busy_resets = 0
        self.hot_reset: list[tuple[int, str]] | None = None
        self.hot_reset_flags = 0
        self.features: dict[int, tuple[int, int, Callable[[int, memoryview], int]]] = {}
        """By id: ways (bits 16 and 17 of flags), least argsz, what it does."""
        self.attached = 0
        self.dead = False
        config = self.memory[CONFIG]
        config[0:4] = bytes.fromhex("3412e811")
        config[4] = MEMORY | 4
        config[8:12] = bytes.fromhex("100000ff")
        config[0x2C:0x30] = bytes.fromhex("f41a0011")

    # register space

    def _place(self, offset: int) -> tuple[int, int]:
        for index, base in enumerate(OFFSETS):
            if self.sizes[index] and base <= offset < base + self.sizes[index]:
                return index, offset - base
        raise fail(errno.EINVAL)

    def _check_memory(self, index: int) -> None:
        if index < 6 and not self.memory[CONFIG][4] & MEMORY:
            raise fail(errno.EIO)

    def pread(self, count: int, offset: int) -> bytes:
        index, at = self._place(offset)
        self._check_memory(index)
        self.accesses.append(("read", index, at, count))
        if self.dead and (index != CONFIG or at >= 4):
            return b"\xff" * count
        return bytes(self.memory[index][at : at + count])

    def pwrite(self, data: bytes, offset: int) -> int:
        index, at = self._place(offset)
        self._check_memory(index)
        self.accesses.append(("write", index, at, len(data)))
        data = data[: self.sizes[index] - at]
        self.memory[index][at : at + len(data)] = data
        return len(data)

    # info

    def get_info(self, view: memoryview) -> int:
        if struct.unpack_from("=I", view)[0] < 20:
            raise fail(errno.EINVAL)
        struct.pack_into("=IIII", view, 0, 24, 2 | (1 if self.resets and self.tells_reset else 0), 9, 5)
        return 0

    def get_region_info(self, view: memoryview) -> int:
        argsz, _, index = struct.unpack_from("=III", view)
        if argsz < 32 or index > 8 or (index == 8 and not self.sizes[8]):
            raise fail(errno.EINVAL)
        caps = self.capabilities.get(index, [])
        body, at = b"", 32
        for number, (cap, data) in enumerate(caps):
            size = 8 + len(data)
            body += struct.pack("=HHI", cap, 1, at + size if number + 1 < len(caps) else 0) + data
            at += size
        flags = self.flags[index] | (8 if caps else 0)
        fits = argsz >= 32 + len(body)
        cap_offset = 32 if caps and fits else 0
        struct.pack_into(
            "=IIIIQQ",
            view,
            0,
            argsz if fits else 32 + len(body),
            flags,
            index,
            cap_offset,
            self.sizes[index],
            OFFSETS[index],
        )
        if fits:
            view[32 : 32 + len(body)] = body
        return 0

    def get_irq_info(self, view: memoryview) -> int:
        argsz, _, index, _ = struct.unpack_from("=IIII", view)
        if argsz < 16 or index > 4 or (index == 3 and not self.irq_counts[3]):
            raise fail(errno.EINVAL)
        struct.pack_into("=IIII", view, 0, 16, self.irq_flags[index], index, self.irq_counts[index])
        return 0

    # interrupts

    def set_irqs(self, view: memoryview) -> int:
        argsz, flags, index, start, count = struct.unpack_from("=IIIII", view)
        kind, action = flags & 7, flags & 0x38
        if argsz < 20 or index > 4 or flags & ~0x3F or kind not in (NONE, BOOL, EVENTFD):
            raise fail(errno.EINVAL)
        limit = self.irq_counts[index]
        if start >= limit or start + count > limit:
            raise fail(errno.EINVAL)
        width = {NONE: 0, BOOL: 1, EVENTFD: 4}[kind]
        if argsz - 20 < count * width:
            raise fail(errno.EINVAL)
        data = bytes(view[20 : 20 + count * width])
        values = list(struct.unpack(f"={count}i", data)) if kind == EVENTFD else list(data)
        self.calls.append(f"irqs {index} {flags:#x} {start}+{count} {'' if kind == EVENTFD else values}".rstrip())
        if index == 0 and action in (MASK, UNMASK):
            return self._mask(kind, action, count, values)
        if action != TRIGGER:
            raise fail(errno.ENOTTY)
        if index in (3, 4):
            return self._single(index, kind, count, values)
        return self._trigger(index, kind, start, count, values)

    def _mask(self, kind: int, action: int, count: int, values: list[int]) -> int:
        if self.mode != 0 or count != 1:
            raise fail(errno.EINVAL)
        if kind == EVENTFD and action == MASK:
            raise fail(errno.ENOTTY)
        if kind == EVENTFD:
            self._put(self.resample)
            self.resample = self._take(values[0])
        elif kind == NONE or values[0]:
            self.masked = action == MASK
        return 0

    def _single(self, index: int, kind: int, count: int, values: list[int]) -> int:
        now = self.triggers.get((index, 0))
        if kind == NONE:
            if now is None:
                raise fail(errno.EINVAL)
            if count:
                os.eventfd_write(now, 1)
            else:
                self._put(self.triggers.pop((index, 0)))
            return 0
        if not count:
            raise fail(errno.EINVAL)
        if kind == BOOL:
            if values[0] and now is not None:
                os.eventfd_write(now, 1)
        else:
            self._arm(index, 0, values[0])
        return 0

    def _trigger(self, index: int, kind: int, start: int, count: int, values: list[int]) -> int:
        on = self.mode == index
        if on and kind == NONE and not count:
            self.turn_off()
            return 0
        if (not on and self.mode is not None) or (index == 0 and count != 1):
            raise fail(errno.EINVAL)
        if kind != EVENTFD:
            if not on or start + count > self.allocated:
                raise fail(errno.EINVAL)
            self._fire(index, [start + i for i in range(count) if kind == NONE or values[i]])
            return 0
        if not on and start + count > self.vectors_had:
            return self.vectors_had
        if not on:
            self.mode, self.allocated = index, start + count
        self._arm_all(index, start, values, first=not on)
        return 0

    def _fire(self, index: int, vectors: list[int]) -> None:
        for vector in vectors:
            if (index, vector) in self.triggers:
                os.eventfd_write(self.triggers[index, vector], 1)

    def _arm_all(self, index: int, start: int, values: list[int], *, first: bool) -> None:
        try:
            for vector, fd in enumerate(values, start):
                if vector >= self.allocated and (index != 2 or self.irq_flags[2] & 8):
                    raise fail(errno.EINVAL)
                self._arm(index, vector, fd)
        except OSError:
            for vector in range(start, start + len(values)):
                self._arm(index, vector, -1)
            if first:
                self.turn_off()
            raise
        self.allocated = max(self.allocated, start + len(values))

    def _arm(self, index: int, vector: int, fd: int) -> None:
        new = self._take(fd)
        if (index, vector) in self.triggers:
            self._put(self.triggers.pop((index, vector)))
        if new >= 0:
            self.triggers[index, vector] = new

    @staticmethod
    def _take(fd: int) -> int:
        if fd < 0:
            return -1
        try:
            if not is_eventfd(fd):
                raise fail(errno.EINVAL)
        except FileNotFoundError:
            raise fail(errno.EBADF) from None
        return os.dup(fd)

    @staticmethod
    def _put(fd: int) -> None:
        if fd >= 0:
            os.close(fd)

    def turn_off(self) -> None:
        for key in [key for key in self.triggers if key[0] == self.mode]:
            self._put(self.triggers.pop(key))
        self._put(self.resample)
        self.resample, self.mode, self.allocated, self.masked = -1, None, 0, False

    def signal(self, index: int, vector: int = 0) -> None:
        """The hardware, or the kernel, raises an interrupt."""
        os.eventfd_write(self.triggers[index, vector], 1)

    # resets and features

    def reset(self) -> int:
        if not self.resets:
            raise fail(errno.EINVAL)
        if self.busy_resets:
            self.busy_resets -= 1
            raise fail(errno.EAGAIN)
        self.calls.append("reset")
        return 0

    def hot_reset_info(self, view: memoryview) -> int:
        if self.hot_reset is None:
            raise fail(errno.ENODEV)
        size = 12 + 8 * len(self.hot_reset)
        argsz = struct.unpack_from("=I", view)[0]
        struct.pack_into("=III", view, 0, size, self.hot_reset_flags, len(self.hot_reset))
        if argsz < size:
            raise fail(errno.ENOSPC)
        for i, (known_as, bdf) in enumerate(self.hot_reset):
            segment, bus, rest = bdf.split(":")
            slot, function = rest.split(".")
            devfn = int(slot, 16) << 3 | int(function)
            struct.pack_into("=iHBB", view, 12 + 8 * i, known_as, int(segment, 16), int(bus, 16), devfn)
        return 0

    def do_hot_reset(self, view: memoryview, groups: list[int], *, by_cdev: bool) -> int:
        """`groups`: numbers of the groups whose fds were passed."""
        if self.hot_reset is None:
            raise fail(errno.ENODEV)
        owned = bool(self.hot_reset_flags & 2) if by_cdev else {group for group, _ in self.hot_reset} <= set(groups)
        if not owned:
            raise fail(errno.EINVAL)
        self.calls.append("hot reset")
        return 0

    def feature(self, view: memoryview) -> int:
        argsz, flags = struct.unpack_from("=II", view)
        ways = flags & 0x30000
        probe = bool(flags & 0x40000)
        if argsz < 8 or flags & ~0x7FFFF or (ways == 0x30000 and not probe) or not flags & 0x70000:
            raise fail(errno.EINVAL)
        if flags & 0xFFFF not in self.features:
            raise fail(errno.ENOTTY)
        has, least, act = self.features[flags & 0xFFFF]
        if ways & ~has:
            raise fail(errno.EINVAL)
        if probe:
            return 0
        if argsz < least:
            raise fail(errno.EINVAL)
        return act(flags, view[8:argsz])

    def release(self) -> None:
        """Its last fd was closed."""
        self.turn_off()
        for fd in self.triggers.values():
            self._put(fd)
        self.triggers.clear()
        self.memory[CONFIG][4] &= ~4
        self.attached = 0
        self.calls.append("released")
