"""Owns a function as two see it: who opens it with VFIO, and the server's client. Both answer the same questions.

The two cannot have it at the same time, so what is asked of one is written down and asked of the other afterwards.
"""

import errno
import fcntl
import os
import select
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from tests.vm.guest.checks import equal
from tests.vm.guest.raw_vfio import (
    CONFIG_REGION,
    DEVICE_GET_IRQ_INFO,
    DEVICE_GET_REGION_INFO,
    CdevDevice,
    GroupDevice,
)
from tests.vm.guest.served import SECONDS, serve, socket_of
from vfu_server import uapi
from vfu_server.session_config import flr_bits
from vfu_server.testing import Client
from vfu_server.uapi import HEADER, HeaderFlag

REACHED = 7
"""Flags of a region that mean something to both: read, write, mmap."""
RESETS = 1
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """What VFIO tells of a function: whether it resets, (flags, size) by region, (flags, count) by interrupt index."""

    resets: bool
    regions: tuple[tuple[int, int], ...]
    irqs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Access:
    """One access to config space; `value` None: a read."""

    offset: int
    width: int
    value: int | None = None

    def __str__(self) -> str:
        if self.value is None:
            return f"read of {self.width} bytes at {self.offset:#x}"
        return f"write of {self.value:#0{2 + 2 * self.width}x} at {self.offset:#x}"


class Side(Protocol):
    """The function, opened, as one of the two sees it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def shape(self) -> Shape:
        """What VFIO tells of the function."""
        ...

    def config(self, accesses: Sequence[Access]) -> list[int | str]:
        """Accesses to config space, one after the other: what was read, 0 for a write, or the name of the errno."""
        ...

    def block(self, region: int, size: int) -> bytes:
        """A region from its beginning, as somebody reads it who knows that it is memory."""
        ...


class Raw:
    """As whoever opens it with VFIO."""

    def __init__(self, bdf: str, door: str) -> None:
        self._device = {"group": GroupDevice, "cdev": CdevDevice}[door](bdf)
        self._config = self._device.region(CONFIG_REGION)[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._device.__exit__()

    def shape(self) -> Shape:
        flags, regions, irqs = self._device.info()
        return Shape(
            bool(flags & RESETS),
            tuple(self._ask(DEVICE_GET_REGION_INFO, "=4I2Q", index) for index in range(regions)),
            tuple(self._ask(DEVICE_GET_IRQ_INFO, "=4I", index) for index in range(irqs)),
        )

    def _ask(self, number: int, layout: str, index: int) -> tuple[int, int]:
        """(flags, size or count); nothing of what is not there."""
        buffer = bytearray(struct.calcsize(layout))
        struct.pack_into("=3I", buffer, 0, len(buffer), 0, index)
        try:
            fcntl.ioctl(self._device.fd, number, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0, 0
        fields = struct.unpack(layout, buffer)
        if not fields[4 if number == DEVICE_GET_REGION_INFO else 3]:
            return 0, 0
        return (fields[1] & REACHED, fields[4]) if number == DEVICE_GET_REGION_INFO else (fields[1], fields[3])

    def config(self, accesses: Sequence[Access]) -> list[int | str]:
        return [self._access(access) for access in accesses]

    def _access(self, access: Access) -> int | str:
        at = self._config + access.offset
        try:
            if access.value is None:
                return int.from_bytes(os.pread(self._device.fd, access.width, at), "little")
            os.pwrite(self._device.fd, access.value.to_bytes(access.width, "little"), at)
        except OSError as error:
            return errno.errorcode[error.errno]
        return 0

    def block(self, region: int, size: int) -> bytes:
        at = self._device.region(region)[1]
        return os.pread(self._device.fd, size, at)


class Served:
    """As the client of a server that presents it with the plugin vfio."""

    def __init__(self, bdf: str, *options: object) -> None:
        self.server = serve(bdf, *options, plugin="vfio")
        try:
            self.client = Client.connect(socket_of(bdf), timeout=SECONDS)
            self.client.negotiate()
            self._flr = flr_bits(self.client.region_read(CONFIG_REGION, 0, 256))
        except BaseException:
            self.server.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        try:
            self.server.end(seconds=SECONDS)
        finally:
            self.server.__exit__()

    def shape(self) -> Shape:
        info = self.client.get_info()
        regions = tuple(self._region(index) for index in range(info.num_regions))
        irqs = [self.client.get_irq_info(index) for index in range(info.num_irqs)]
        return Shape(info.can_reset, regions, tuple((irq.flags if irq.count else 0, irq.count) for irq in irqs))

    def _region(self, index: int) -> tuple[int, int]:
        region = self.client.get_region_info(index)
        if region.fd >= 0:
            os.close(region.fd)
        return (region.flags & REACHED, region.size) if region.size else (0, 0)

    def config(self, accesses: Sequence[Access]) -> list[int | str]:
        """Many messages at once, since here each turn of both processes costs milliseconds; a reset is waited for."""
        answers: list[int | str] = []
        batch: list[Access] = []
        for access in accesses:
            batch.append(access)
            if len(batch) == AT_ONCE or self._may_reset(access):
                answers += self._exchange(batch)
                batch.clear()
        return answers + self._exchange(batch)

    def _may_reset(self, access: Access) -> bool:
        end = access.offset + access.width
        return access.value is not None and any(access.offset <= at < end for at, _ in self._flr)

    def _exchange(self, batch: Sequence[Access]) -> list[int | str]:
        self.client.send_raw(b"".join(_message(number, access) for number, access in enumerate(batch)))
        replies: dict[int, int | str] = {}
        stream = bytearray()
        deadline = time.monotonic() + SECONDS
        while len(replies) < len(batch):
            if not select.select([self.client.sock], [], [], deadline - time.monotonic())[0]:
                raise AssertionError(f"{len(replies)} replies to {len(batch)} accesses within {SECONDS:g} s")
            stream += self.client.sock.recv(1 << 16)
            while len(stream) >= HEADER.size:
                number, command, size, flags, error = HEADER.unpack_from(stream)
                if len(stream) < size:
                    break
                body = bytes(stream[HEADER.size + uapi.REGION_ACCESS.size : size])
                del stream[:size]
                equal((command, number in replies), (_command(batch[number]), False), "reply")
                replies[number] = errno.errorcode[error] if flags & HeaderFlag.ERROR else int.from_bytes(body, "little")
        return [replies[number] for number in range(len(batch))]

    def block(self, region: int, size: int) -> bytes:
        return self.client.read_block(region, 0, size)


def _command(access: Access) -> int:
    return uapi.Command.REGION_READ if access.value is None else uapi.Command.REGION_WRITE


def _message(number: int, access: Access) -> bytes:
    data = b"" if access.value is None else access.value.to_bytes(access.width, "little")
    head = uapi.REGION_ACCESS.pack(access.offset, CONFIG_REGION, access.width)
    size = HEADER.size + len(head) + len(data)
    return HEADER.pack(number, _command(access), size, 0, 0) + head + data


def hardware(bdf: str) -> bytes:
    """Config space as the kernel reads it from the function itself."""
    return (Path("/sys/bus/pci/devices") / bdf / "config").read_bytes()
