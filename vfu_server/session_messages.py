"""What a client's ordered messages do: interrupts, DMA maps, reset, device features.

Each handler returns the payload of a good reply or raises VfuServerError. It must not know sockets, threads or who
waits: the session calls one handler at a time.
"""

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from vfu_server import feature, uapi
from vfu_server.device import Device
from vfu_server.errors import ClientError, DeadlineError, HostError, PluginError, StateError, VfuServerError
from vfu_server.feature import FeatureRequest, Offer
from vfu_server.host_device import HostDevice
from vfu_server.libvfio_user.context import Message
from vfu_server.session_config import without_flr
from vfu_server.session_dirty import DirtyLog
from vfu_server.session_memory import ClientMemory
from vfu_server.session_migration import Migration
from vfu_server.session_notice import MigrationNotice
from vfu_server.uapi import Command, Feature, IrqIndex, MigState, RegionIndex

log = logging.getLogger(__name__)

SAVING = (MigState.PRE_COPY, MigState.PRE_COPY_P2P, MigState.STOP_COPY)
"""States in which a device's state is read."""

Answer = TypeVar("Answer")

QUESTION_DEADLINE = 1.0
"""Seconds for a plugin's answer to a question that a client asks."""


class Messages:
    """The handlers for one device; `armed` are the interrupt indexes that its present client has set up."""

    def __init__(
        self, host: HostDevice, device: Device, migration: Migration, dirty: DirtyLog, memory: ClientMemory
    ) -> None:
        self._host = host
        self._device = device
        self._migration = migration
        self._dirty = dirty
        self.armed: set[int] = set()
        self.precopy_flags = False
        """The present client wants the flags of MIG_PRECOPY_INFO."""
        self.notice = MigrationNotice()
        self._memory = memory
        self._handlers: dict[Command, Callable[[Message], Awaitable[bytes]]] = {
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DMA_MAP: memory.map,
            Command.DMA_UNMAP: memory.unmap,
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
        if flags & uapi.IRQ_SET_ACTION_TRIGGER and kind == uapi.IRQ_SET_DATA_EVENTFD:
            await self._arm(index, self._host.set_irqs(index, flags, start, count, data, message.fds))
            self.notice.armed(index)
            return b""
        await self._host.set_irqs(index, flags, start, count, data, message.fds)
        if flags & uapi.IRQ_SET_ACTION_TRIGGER and kind == uapi.IRQ_SET_DATA_NONE and count == 0:
            self.armed.discard(index)
        return b""

    async def _arm(self, index: int, request: Awaitable[None]) -> None:
        """Remember `index` unless it was refused: what is not answered in time may have been done all the same."""
        known = index in self.armed
        self.armed.add(index)
        try:
            await request
        except HostError as error:
            if not known and error.errno != errno.ETIMEDOUT:
                self.armed.discard(index)
            raise

    async def release_irqs(self) -> None:
        """Turn off what the client has set up: its eventfds go back."""
        for index in sorted(self.armed):
            flags = uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER
            try:
                await self._host.set_irqs(index, flags, 0, 0)
            except HostError as error:
                log.warning("interrupts of index %s could not be turned off: %s", IrqIndex(index).name, error)
        self.armed.clear()

    # reset

    async def _device_reset(self, _message: Message) -> bytes:
        await self._migration.reset()
        return b""

    async def _function_level_reset(self, message: Message) -> bytes:
        log.info("function level reset by the client")
        self._write_what_came_with_it(message.payload)
        await self._migration.reset()
        return message.payload[: uapi.REGION_ACCESS.size]

    def _write_what_came_with_it(self, payload: bytes) -> None:
        """The bits beside those of a reset: vfio-pci writes them first, and they outlast the reset.

        Not where the plugin has rules of its own for config space, which this write would pass by.
        """
        if any(rule.region == RegionIndex.CONFIG for rule in self._device.policy.rules):
            return
        offset, _, count = uapi.REGION_ACCESS.unpack_from(payload)
        data = payload[uapi.REGION_ACCESS.size :][:count]
        header = self._host.read_block(RegionIndex.CONFIG, 0, uapi.PCI_CFG_SPACE_SIZE)
        self._host.write_block(RegionIndex.CONFIG, offset, without_flr(header, offset, data))

    # features

    async def _device_feature(self, message: Message) -> bytes:
        self.notice.feature_asked()
        flags = 0 if self._barred() else self._migration.flags
        request = feature.parse_feature(message.payload, Offer(self._migration.flags, self._dirty.offered))
        if request.probe or request.feature is Feature.MIGRATION:
            request = feature.parse_feature(message.payload, Offer(flags, self._dirty.offered))
        if request.probe:
            return request.reply()
        if request.feature is Feature.MIG_DEVICE_STATE:
            return await self._device_state(request)
        if request.feature is Feature.MIGRATION:
            return feature.migration_reply(request, flags)
        if request.feature is Feature.MIG_DATA_SIZE:
            return feature.data_size_reply(request, await self._ask(self._migration.data_size, "estimate"))
        if request.feature is Feature.MIG_PRECOPY_INFO:
            return await self._precopy_info(request)
        return await self._dma_logging(request)

    def _barred(self) -> bool:
        """Memory that the hardware cannot reach would not be the same on the other side: no migration begins.

        One that has begun goes on, here or at its destination, where the guest's BARs are not known until the state is
        loaded.
        """
        return self._migration.state not in (*SAVING, MigState.RESUMING) and self._memory.out_of_reach()

    async def _precopy_info(self, request: FeatureRequest) -> bytes:
        if request.set:
            self.precopy_flags = True
            return request.reply()
        info = await self._ask(self._migration.precopy_info, "precopy_info")
        return feature.precopy_info_reply(request, info, with_flags=self.precopy_flags)

    async def _ask(self, question: Callable[[], Awaitable[Answer]], name: str) -> Answer:
        try:
            with trio.move_on_after(QUESTION_DEADLINE):
                return await question()
        except StateError:
            raise  # the client's mistake
        except VfuServerError as error:
            raise PluginError(f"the plugin's {name} failed: {error}", error.errno) from error
        except Exception as error:
            log.exception("the plugin's %s failed", name)
            raise PluginError(f"the plugin's {name} failed: {error!r}") from error
        raise DeadlineError(f"the plugin's {name} took longer than {QUESTION_DEADLINE} s")

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
            wanted = feature.wanted_state(request)
            # A refusal, to a client that was offered migration before. Told that there is no such feature, QEMU would
            # reset the device, which is at work; and it stops and starts devices with the machine in any case.
            if wanted in SAVING and self._barred():
                raise StateError("there is guest memory that the hardware cannot reach: no migration begins")
            await self._migration.set_state(wanted)
        return feature.state_reply(request, self._migration.state)
