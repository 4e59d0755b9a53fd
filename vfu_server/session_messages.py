"""What a client's ordered messages do: interrupts, DMA maps, reset, device features.

Each handler returns the payload of a good reply or raises VfuServerError. It must not know sockets, threads or who
waits: the session calls one handler at a time.
"""

import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable

import trio

from vfu_server import feature, uapi
from vfu_server.device import Device
from vfu_server.errors import ClientError, HostError
from vfu_server.feature import FeatureRequest, Offer
from vfu_server.host_device import DmaMap, HostDevice
from vfu_server.libvfio_user.context import Message
from vfu_server.migration import migration_flags
from vfu_server.session_dirty import DirtyLog
from vfu_server.session_migration import Migration
from vfu_server.uapi import Command, Feature, IrqIndex

log = logging.getLogger(__name__)

STREAM_OVERHEAD = 16 << 10
"""Bytes that our own header, sections and sums may add to a plugin's estimate."""


class Messages:
    """The handlers for one device; `armed` are the interrupt indexes that its present client has set up."""

    def __init__(self, host: HostDevice, device: Device, migration: Migration, dirty: DirtyLog) -> None:
        self._host = host
        self._device = device
        self._migration = migration
        self._dirty = dirty
        self.armed: set[int] = set()
        self._told: set[str] = set()
        self._handlers: dict[Command, Callable[[Message], Awaitable[bytes]]] = {
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_RESET: self._device_reset,
            Command.REGION_WRITE: self._function_level_reset,
            Command.DEVICE_FEATURE: self._device_feature,
        }

    async def handle(self, message: Message) -> bytes:
        """The payload of the reply to `message`. The caller closes the message's fds."""
        return await self._handlers[message.command](message)

    # interrupts

    async def _set_irqs(self, message: Message) -> bytes:
        layout = uapi.IRQ_SET
        if len(message.payload) < layout.size:
            raise ClientError(f"SET_IRQS of {len(message.payload)} bytes is too short")
        argsz, flags, index, start, count = layout.unpack_from(message.payload)
        if argsz < layout.size or index >= len(self._host.irqs):
            raise ClientError(f"SET_IRQS: argsz {argsz}, index {index}: no such index or too short")
        kind = flags & uapi.IRQ_SET_DATA_TYPE_MASK
        if start > self._host.irqs[index].count or count > self._host.irqs[index].count - start:
            raise ClientError(
                f"SET_IRQS: vectors {start}+{count} of index {index}, which has {self._host.irqs[index].count}"
            )
        if message.fds and (kind != uapi.IRQ_SET_DATA_EVENTFD or len(message.fds) != count):
            raise ClientError(f"SET_IRQS: {len(message.fds)} file descriptors for {count} vectors, flags {flags:#x}")
        data = message.payload[layout.size :]
        if kind == uapi.IRQ_SET_DATA_BOOL and len(data) < count:
            raise ClientError(f"SET_IRQS: {len(data)} bytes of BOOL data for {count} vectors")
        data = data[:count] if kind == uapi.IRQ_SET_DATA_BOOL else b""
        await self._host.set_irqs(index, flags, start, count, data, message.fds)
        if flags & uapi.IRQ_SET_ACTION_TRIGGER and kind == uapi.IRQ_SET_DATA_EVENTFD:
            self.armed.add(index)
        elif flags & uapi.IRQ_SET_ACTION_TRIGGER and kind == uapi.IRQ_SET_DATA_NONE and count == 0:
            self.armed.discard(index)
        return b""

    async def release_irqs(self) -> None:
        """Turn off what the client has set up: its eventfds go back."""
        for index in sorted(self.armed):
            flags = uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER
            try:
                await self._host.set_irqs(index, flags, 0, 0)
            except HostError as error:
                log.warning("interrupts of index %s could not be turned off: %s", IrqIndex(index).name, error)
        self.armed.clear()

    # DMA: only what C did not decide by itself

    async def _dma_map(self, message: Message) -> bytes:
        layout = uapi.DMA_MAP
        _, flags, offset, iova, size = layout.unpack_from(message.payload)
        if flags & ~(uapi.DMA_FLAG_READ | uapi.DMA_FLAG_WRITE):
            raise ClientError(f"DMA_MAP: unknown flags {flags:#x}")
        if message.fds and not stat.S_ISREG(os.fstat(message.fds[0]).st_mode):
            # A peer device's BAR: its fd must not get into our IOMMU; DMA to it faults there instead.
            self._tell_once("peer", f"DMA_MAP {iova:#x}+{size:#x}: memory of another device, accepted and not mapped")
            return b""
        fd = message.fds[0] if message.fds else -1
        try:
            await self._host.dma_map(DmaMap(iova, size, flags, fd, offset if message.fds else 0))
        except HostError as error:
            if error.errno == errno.ENOSPC:
                self._tell_once("limit", f"DMA_MAP {iova:#x}+{size:#x}: the limit on the number of maps is reached")
            raise
        if fd < 0:
            self._tell_once(
                "fdless",
                f"guest memory at {iova:#x}+{size:#x} came without a file descriptor: each DMA to it is a message to"
                " the client; with QEMU use -object memory-backend-memfd,share=on to share it",
            )
        return b""

    async def _dma_unmap(self, message: Message) -> bytes:
        _, flags, iova, size = uapi.DMA_UNMAP.unpack_from(message.payload)
        if flags & uapi.DMA_UNMAP_FLAG_ALL and not iova and not size:
            await self._host.dma_unmap_all()
        elif flags:
            raise ClientError(f"DMA_UNMAP: unknown flags {flags:#x}")
        else:
            await self._host.dma_unmap(iova, size)
        return message.payload[: uapi.DMA_UNMAP.size]

    # reset

    async def _device_reset(self, _message: Message) -> bytes:
        await self._migration.reset()
        return b""

    async def _function_level_reset(self, message: Message) -> bytes:
        log.info("function level reset by the client")
        await self._migration.reset()
        return message.payload[: uapi.REGION_ACCESS.size]

    # features

    async def _device_feature(self, message: Message) -> bytes:
        flags = migration_flags(self._device.capabilities)
        request = feature.parse_feature(message.payload, Offer(flags, self._dirty.offered))
        if request.probe:
            return request.reply()
        if request.feature is Feature.MIG_DEVICE_STATE:
            return await self._device_state(request)
        if request.feature is Feature.MIGRATION:
            return feature.migration_reply(request, flags)
        if request.feature is Feature.MIG_DATA_SIZE:
            with trio.fail_after(1):
                return feature.data_size_reply(request, await self._device.estimate() + STREAM_OVERHEAD)
        return await self._dma_logging(request)

    async def _dma_logging(self, request: FeatureRequest) -> bytes:
        if request.feature is Feature.DMA_LOGGING_START:
            page_size = await self._dirty.start(feature.parse_logging_start(request))
            return feature.logging_start_reply(request, page_size)
        if request.feature is Feature.DMA_LOGGING_REPORT:
            report = feature.parse_logging_report(request, uapi.MAX_DATA_XFER_SIZE)
            return feature.logging_report_reply(request, await self._dirty.report(report))
        if request.feature is Feature.DMA_LOGGING_STOP:
            await self._dirty.stop()
            return request.reply()
        raise ClientError(f"DEVICE_FEATURE {request.feature.name} is not offered", errno.ENOTTY)

    async def _device_state(self, request: FeatureRequest) -> bytes:
        if request.set:
            await self._migration.set_state(feature.wanted_state(request))
        return feature.state_reply(request, self._migration.state)

    def _tell_once(self, key: str, text: str) -> None:
        log.log(logging.DEBUG if key in self._told else logging.WARNING, "%s", text)
        self._told.add(key)
