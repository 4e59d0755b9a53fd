"""The door to a device that another vfio-user server has: a software model, an emulated or a remote device.

It speaks the protocol as a client and hides the socket; the pump reaches the same server through the C door (`native`).
It knows nothing of our own client but the way to its memory (`relay`), for servers that ask for DMA by messages.
"""

import errno
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

import trio

from vfu_server import uapi
from vfu_server.errors import DeviceGoneError, HostError
from vfu_server.host.scratch import scratch_memory
from vfu_server.host_device import (
    DmaMap,
    HostEvent,
    HostStatistics,
    Identity,
    IrqInfo,
    MigrationDoor,
    MmapArea,
    RegionInfo,
    Scratch,
)
from vfu_server.libvfio_user.client import ClientDoor
from vfu_server.uapi import Command, RegionIndex

log = logging.getLogger(__name__)

T = TypeVar("T")
Relay = Callable[[Command, bytes], Awaitable[bytes]]

HANDSHAKE_TIMEOUT = 3.0
RESET_TIMEOUT = 2.5
FEATURE_TIMEOUT = 3.5
"""Seconds for an answer: less than the session has for a reset, and for a change of state or a section. A thread waits,
which no deadline of theirs can end, and whoever waits is to be told what did not come.
"""
CAPABILITIES = {
    "capabilities": {
        "max_msg_fds": 8,
        "max_data_xfer_size": uapi.MAX_DATA_XFER_SIZE,
        "pgsizes": uapi.PAGE_SIZE,
    }
}


class VfioUserHost:
    """A HostDevice over a vfio-user socket."""

    def __init__(self, name: str, door: ClientDoor, flags: int, regions: list[RegionInfo], irqs: list[IrqInfo]) -> None:
        self.name = name
        self.regions: Sequence[RegionInfo] = regions
        self.irqs: Sequence[IrqInfo] = irqs
        self.can_reset = bool(flags & uapi.DEVICE_FLAGS_RESET)
        self.dma_by_messages = True
        self.cannot_revoke = "it is behind another server's socket: only a kernel can take mappings away"
        self.relay: Relay | None = None
        self.migration: MigrationDoor | None = None
        """Not used: a server that migrates its device by itself is connected to by the client."""
        self._door = door
        self._closed = False

    @classmethod
    async def open(cls, path: str, name: str | None = None) -> "VfioUserHost":
        """Connect to the server at `path` and ask what its device is. HostError names what did not work."""
        name = name or path
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(HANDSHAKE_TIMEOUT)
            await trio.to_thread.run_sync(sock.connect, path)
            sock.settimeout(None)
        except OSError as error:
            sock.close()
            raise HostError(
                f"cannot connect to the device's server at {path}: {error.strerror or error}", error.errno
            ) from error
        door = ClientDoor(sock.detach())
        try:
            return await trio.to_thread.run_sync(_ask, name, door, cls)
        except BaseException as error:
            await trio.to_thread.run_sync(door.close)
            if isinstance(error, OSError):
                text = f"the device's server at {path} does not complete the handshake: {error.strerror or error}"
                raise HostError(text, error.errno) from error
            raise

    @property
    def iova_ranges(self) -> Sequence[tuple[int, int]]:
        """See HostDevice. A server says nothing about it."""
        return ()

    @property
    def native(self) -> ClientDoor:
        """The C door."""
        return self._door

    # registers

    def read(self, region: int, offset: int, width: int) -> int:
        """See HostDevice."""
        return int.from_bytes(self._call(self._door.read, region, offset, width), "little")

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """See HostDevice."""
        self._call(self._door.write, region, offset, value.to_bytes(width, "little"))

    def read_block(self, region: int, offset: int, length: int) -> bytes:
        """See HostDevice."""
        return self._call(self._door.read, region, offset, length)

    def write_block(self, region: int, offset: int, data: bytes) -> None:
        """See HostDevice."""
        self._call(self._door.write, region, offset, data)

    def write_wide(self, region: int, offset: int, data: bytes) -> None:
        """See HostDevice. One message; a server that refuses it (EINVAL) gets two of 8 bytes, the low one first."""
        self._call(self._door.write_wide, region, offset, data)

    def identity(self) -> Identity:
        """See HostDevice."""
        header = self.read_block(RegionIndex.CONFIG, 0, 64)
        vendor, device = struct.unpack_from("<HH", header, uapi.PCI_VENDOR_ID)
        subsystem_vendor, subsystem = struct.unpack_from("<HH", header, uapi.PCI_SUBSYSTEM_VENDOR_ID)
        revision = header[uapi.PCI_REVISION_ID]
        class_code = int.from_bytes(header[uapi.PCI_CLASS_PROG : uapi.PCI_CLASS_PROG + 3], "little")
        return Identity(vendor, device, subsystem_vendor, subsystem, revision, class_code)

    # requests

    async def set_irqs(
        self, index: int, flags: int, start: int, count: int, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """See HostDevice. Larger sets of eventfds go in messages of eight."""
        size = uapi.IRQ_SET.size + len(data)
        if len(fds) <= uapi.MAX_MSG_FDS:
            payload = uapi.IRQ_SET.pack(size, flags, index, start, count) + data
            await self._request(Command.DEVICE_SET_IRQS, payload, fds=fds)
            return
        for at in range(0, count, uapi.MAX_MSG_FDS):
            some = fds[at : at + uapi.MAX_MSG_FDS]
            payload = uapi.IRQ_SET.pack(size, flags, index, start + at, len(some))
            await self._request(Command.DEVICE_SET_IRQS, payload, fds=some)

    async def dma_map(self, dma_map: DmaMap) -> None:
        """See HostDevice."""
        await self._in_thread(lambda: self._door.dma_map(dma_map))

    async def dma_unmap(self, iova: int, size: int) -> None:
        """See HostDevice."""
        await self._in_thread(lambda: self._door.dma_unmap(iova, size))

    async def dma_unmap_all(self) -> None:
        """See HostDevice."""
        await self._in_thread(self._door.dma_unmap_all)

    async def is_peer(self, fd: int) -> bool:
        """See HostDevice. A server has no use for another device's file."""
        return False

    async def reset(self) -> str:
        """See HostDevice. The only means over a socket is DEVICE_RESET."""
        if not self.can_reset:
            raise HostError("the device has no reset (its server does not offer DEVICE_RESET)", errno.EINVAL)
        await self._request(Command.DEVICE_RESET, b"", timeout=RESET_TIMEOUT)
        return "DEVICE_RESET"

    async def device_feature(self, flags: int, data: bytes = b"", reply_size: int = 0) -> bytes:
        """See HostDevice."""
        header = uapi.DEVICE_FEATURE
        argsz = header.size + max(len(data), reply_size)
        reply = await self._request(
            Command.DEVICE_FEATURE, header.pack(argsz, flags) + data, room=argsz, timeout=FEATURE_TIMEOUT
        )
        return reply[header.size :]

    async def mig_data_read(self, size: int) -> bytes:
        """MIG_DATA_READ: up to `size` bytes of the device's state; empty at its end."""
        header = uapi.MIG_DATA
        reply = await self._request(
            Command.MIG_DATA_READ,
            header.pack(header.size + size, size),
            room=header.size + size,
            timeout=FEATURE_TIMEOUT,
        )
        got = int(header.unpack_from(reply)[1])
        return reply[header.size : header.size + got]

    async def mig_data_write(self, data: bytes) -> None:
        """MIG_DATA_WRITE: all of `data`, or an error."""
        header = uapi.MIG_DATA
        await self._request(
            Command.MIG_DATA_WRITE, header.pack(header.size + len(data), len(data)) + data, timeout=FEATURE_TIMEOUT
        )

    def scratch(self, size: int, limit: int = 1 << 64) -> AbstractAsyncContextManager[Scratch | None]:
        """See HostDevice: a memfd of ours, mapped like the client's memory."""
        return scratch_memory(self._door, size, limit)

    async def events(self) -> AsyncIterator[HostEvent]:
        """See HostDevice; in passing, DMA commands of the server are relayed to the client."""
        while not self._closed:
            await trio.lowlevel.wait_readable(self._door.fileno())
            while command := self._door.next_command():
                await self._relay_command(command)
            if self._door.gone and not self._closed:
                yield HostEvent("gone", "the device's server has closed the connection or does not answer")
                return

    async def _relay_command(self, command: Any) -> None:
        payload, error = b"", errno.ENOSYS
        if self.relay is not None and command.command in (Command.DMA_READ, Command.DMA_WRITE):
            try:
                payload, error = await self.relay(command.command, command.payload), 0
            except OSError as failed:
                error = failed.errno or errno.EIO
        with suppress(OSError):
            await trio.to_thread.run_sync(self._door.reply, command, payload, error)

    def statistics(self) -> HostStatistics:
        """See HostDevice."""
        numbers = self._door.numbers()
        return HostStatistics(numbers.dma_maps, numbers.dma_bytes, numbers.requests, numbers.errors)

    async def aclose(self) -> None:
        """See HostDevice."""
        if not self._closed:
            self._closed = True
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._door.close)
            for region in self.regions:
                if region.fd >= 0:
                    os.close(region.fd)

    # errors

    def _call(self, function: Callable[..., T], *args: object) -> T:
        try:
            return function(*args)
        except OSError as error:
            raise self._error(error) from error

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(self._call, function)

    async def _request(
        self, command: Command, payload: bytes, *, fds: Sequence[int] = (), room: int = 4096, timeout: float = 3.0
    ) -> bytes:
        def ask() -> bytes:
            reply, extra = self._door.request(command, payload, fds=fds, room=room, timeout=timeout)
            _close_all(extra)
            return reply

        try:
            return await self._in_thread(ask)
        except HostError as error:
            error.add_note(f"in {command.name}")
            raise

    def _error(self, error: OSError) -> HostError:
        if self._door.gone:
            return DeviceGoneError(f"the device's server ({self.name}) is gone")
        return HostError(f"the device's server ({self.name}) answered: {error.strerror}", error.errno)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


# --- the handshake: blocking, in a worker thread


def _ask(name: str, door: ClientDoor, cls: type[VfioUserHost]) -> VfioUserHost:
    _negotiate(door)
    info = uapi.DEVICE_INFO
    reply, fds = door.request(Command.DEVICE_GET_INFO, info.pack(info.size, 0, 0, 0), timeout=HANDSHAKE_TIMEOUT)
    _close_all(fds)
    _, flags, num_regions, num_irqs = _unpack(info, reply, "DEVICE_GET_INFO")
    if not flags & uapi.DEVICE_FLAGS_PCI or num_regions < uapi.NUM_REGIONS - 1 or num_irqs < uapi.NUM_IRQS - 2:
        raise HostError(f"the device's server presents no PCI device (flags {flags:#x}, {num_regions} regions)")
    regions: list[RegionInfo] = []
    try:
        for index in range(uapi.NUM_REGIONS):
            regions.append(_region_info(door, index) if index < num_regions else RegionInfo(index, 0))
        irqs = [_irq_info(door, index) if index < num_irqs else IrqInfo(index, 0) for index in range(uapi.NUM_IRQS)]
    except BaseException:
        _close_all([region.fd for region in regions if region.fd >= 0])
        raise
    return cls(name, door, flags, regions, irqs)


def _negotiate(door: ClientDoor) -> None:
    text = json.dumps(CAPABILITIES).encode() + b"\0"
    reply, fds = door.request(Command.VERSION, uapi.VERSION.pack(0, 0) + text, timeout=HANDSHAKE_TIMEOUT)
    _close_all(fds)
    major, minor = _unpack(uapi.VERSION, reply, "VERSION")
    if (major, minor) != (0, 0):
        raise HostError(f"the device's server speaks vfio-user {major}.{minor}, we speak 0.0")
    try:
        parsed = json.loads(reply[uapi.VERSION.size :].rstrip(b"\0") or b"{}")
        size = parsed.get("capabilities", {}).get("max_data_xfer_size", uapi.MAX_DATA_XFER_SIZE)
        door.set_max_transfer(max(int(size), 8))
    except (ValueError, TypeError, AttributeError) as error:
        raise HostError("the device's server sent capabilities that are no JSON object") from error


def _region_info(door: ClientDoor, index: int) -> RegionInfo:
    layout = uapi.REGION_INFO
    argsz = layout.size
    while True:
        payload = layout.pack(argsz, 0, index, 0, 0, 0)
        try:
            reply, fds = door.request(Command.DEVICE_GET_REGION_INFO, payload, room=argsz, timeout=HANDSHAKE_TIMEOUT)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return RegionInfo(index, 0)  # a server without that region (VGA)
            raise
        needed, flags, _, cap_offset, size, fd_offset = _unpack(layout, reply, "DEVICE_GET_REGION_INFO")
        if argsz < needed <= layout.size + 4096:
            _close_all(fds)
            argsz = needed
            continue
        break
    _close_all(fds[1:])
    if not fds or not flags & uapi.REGION_INFO_FLAG_MMAP:
        _close_all(fds[:1])
        return RegionInfo(index, size, flags & ~uapi.REGION_INFO_FLAG_MMAP)
    areas = _sparse_areas(reply, cap_offset) if flags & uapi.REGION_INFO_FLAG_CAPS else (MmapArea(0, size),)
    return RegionInfo(index, size, flags, areas, fds[0], fd_offset)


def _sparse_areas(reply: bytes, offset: int) -> tuple[MmapArea, ...]:
    header, sparse, area = uapi.CAP_HEADER, uapi.SPARSE_HEADER, uapi.SPARSE_AREA
    while offset and offset + header.size <= len(reply):
        cap, _, following = header.unpack_from(reply, offset)
        if cap == uapi.REGION_INFO_CAP_SPARSE_MMAP and offset + header.size + sparse.size <= len(reply):
            at = offset + header.size
            count = sparse.unpack_from(reply, at)[0]
            room = (len(reply) - at - sparse.size) // area.size
            return tuple(
                MmapArea(*area.unpack_from(reply, at + sparse.size + i * area.size)) for i in range(min(count, room))
            )
        offset = following if following > offset else 0
    return ()


def _irq_info(door: ClientDoor, index: int) -> IrqInfo:
    layout = uapi.IRQ_INFO
    payload = layout.pack(layout.size, 0, index, 0)
    reply, fds = door.request(Command.DEVICE_GET_IRQ_INFO, payload, timeout=HANDSHAKE_TIMEOUT)
    _close_all(fds)
    _, flags, _, count = _unpack(layout, reply, "DEVICE_GET_IRQ_INFO")
    return IrqInfo(index, count, flags)


def _unpack(layout: struct.Struct, reply: bytes, what: str) -> tuple[Any, ...]:
    if len(reply) < layout.size:
        raise HostError(f"the device's server sent a reply to {what} that is too short")
    return layout.unpack_from(reply)
