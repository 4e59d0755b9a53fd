"""A physical function driven from here: brought up once for all of its virtual functions, watched, and led back.

It knows commands and their order, no client and no virtual function's state. It runs as the companion of the devices
that use it (`serve`), so the server opens and closes its door. What its death means to them: every command raises
PfDeadError; after it was brought up again each virtual function has to be reset before it is used (`generation`).
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from plugins.mlx5 import boot, events, gate
from plugins.mlx5.boot import Adapter, query_caps, set_caps
from plugins.mlx5.command_queue import CommandQueue
from plugins.mlx5.contexts import CAP_GENERAL, CAP_GENERAL_2, EQE, GENERAL, GENERAL_2, MODE_MAX
from plugins.mlx5.eswitch import Eswitch
from plugins.mlx5.events import EventQueue
from plugins.mlx5.init_segment import InitSegment
from plugins.mlx5.layouts import ALLOC_UAR, DEALLOC_UAR, DISABLE_HCA, ENABLE_HCA
from plugins.mlx5.pages import Pages, signed
from plugins.mlx5.status import CommandError, PfDeadError
from vfu_server.dma_memory import DmaMemory
from vfu_server.errors import DeviceGoneError, HostError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, RegionIndex

log = logging.getLogger(__name__)

HEALTH_EVERY: Final = 1.0
MISSES: Final = 3
"""Looks in a row at which the health counter stood still: dead."""
RECOVERIES: Final = 3
STOP_SECONDS: Final = 2.5
VF_RECLAIM_PATIENCE: Final = 0.5


@dataclass(slots=True, eq=False)
class VirtualFunction:
    """One virtual function that is in use. `missing`: what keeps it from being migrated."""

    index: int
    user: str
    vhca_id: int
    missing: tuple[gate.Missing, ...]


async def serve(host: HostDevice, task_status: trio.TaskStatus["PhysicalFunction"]) -> None:
    """Bring the physical function up, give it to its users, and lead it back when the last one has left.

    HostError: it is none, or does not come up.
    """
    async with trio.open_nursery() as outer:
        scope = trio.CancelScope(shield=True)
        background: trio.Nursery = await outer.start(_background, scope)
        pf = PhysicalFunction(host, background)
        try:
            await pf.start()
            task_status.started(pf)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await pf.stop()
            pf.ended = True
            scope.cancel()


async def _background(scope: trio.CancelScope, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery that outlives the cancellation of its parent, until `scope` is cancelled: the way back needs it."""
    with scope:
        async with trio.open_nursery() as nursery:
            task_status.started(nursery)
            await trio.sleep_forever()


class PhysicalFunction:
    """One physical function. `nursery`: for what goes on beside its users."""

    def __init__(self, host: HostDevice, nursery: trio.Nursery) -> None:
        self.host = host
        self.nursery = nursery
        self.memory = DmaMemory(host)
        self.segment = InitSegment(host)
        self.queue = CommandQueue(self.segment, self.memory)
        self.pages = Pages(self.queue, self.memory)
        self.events: EventQueue | None = None
        self.uar = 0
        self.firmware = ""
        self.generation = 0
        """Rises whenever it was reset under its users."""
        self.ended = False
        """Its driver is gone; who uses it still may only let go."""
        self._adapter: Adapter | None = None
        self._eswitch: Eswitch | None = None
        self._functions: dict[int, VirtualFunction] = {}
        self._lock = trio.Lock()
        self._watching = trio.CancelScope()
        self._watch_scope = trio.CancelScope()
        self._health = -1, 0
        """The health counter as it was last seen, and looks in a row that told no good."""
        self._command = 0
        """PCI COMMAND as it was found."""

    @property
    def adapter(self) -> Adapter:
        """What the firmware says of itself."""
        if self._adapter is None:
            raise PfDeadError(f"{self.host.name}: it is not up")
        return self._adapter

    def beside(self, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Start a task that goes on beside its users. PfDeadError: there is nothing any more that it could do."""
        if self.ended:
            raise PfDeadError(f"{self.host.name}: its driver here has ended")
        self.nursery.start_soon(task, *arguments)

    # up and down

    async def start(self) -> None:
        """Bring it up; once more after a reset, if an earlier driver has left it in a state of its own."""
        try:
            await self._start_once()
        except DeviceGoneError:
            raise
        except VfuServerError as error:
            log.info("%s: %s; trying again after a reset", self.host.name, error)
            try:
                await self._reset()
                await self._start_once()
            except VfuServerError as second:
                raise HostError(f"the physical function {self.host.name} does not come up: {second}") from second
        self.nursery.start_soon(self._watch, self._watch_scope)

    async def _start_once(self) -> None:
        self._enable_bus()
        self._adapter = await boot.bring_up(self.queue, self.pages)
        self.firmware = self.segment.firmware()
        self.uar = (await self.queue.call(ALLOC_UAR))["uar"]
        if (self.uar + 1) * events.UAR_PAGE > self.host.regions[RegionIndex.BAR0].size:
            raise HostError(f"{self.host.name}: doorbell page {self.uar} lies outside of its BAR")
        self.events = EventQueue(self.host, self.queue, self.memory, self.uar, busy=lambda: bool(self.queue.in_flight))
        self.events.on(events.PAGE_REQUEST, self._on_page_request)
        await self.events.open()
        self._watching = trio.CancelScope()
        self.nursery.start_soon(self._run_events, self.events, self._watching)
        await self._start_eswitch(self._adapter, self.events)
        log.info(
            "%s: physical function up, firmware %s, board %s",
            self.host.name,
            self.firmware,
            self._adapter.psid or "unknown",
        )

    def _enable_bus(self) -> None:
        self._command = command = self.host.read(RegionIndex.CONFIG, PCI_COMMAND, 2)
        wanted = command | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER
        if command != wanted:
            self.host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, wanted)

    async def _start_eswitch(self, adapter: Adapter, queue: EventQueue) -> None:
        """Frames are not what a migration waits for: without an e-switch there is a warning and no more."""
        self._eswitch = None
        try:
            if not await Eswitch.offered(self.queue, adapter.general.data):
                log.info(
                    "%s: it does not rule its e-switch: frames of its functions are another's care", self.host.name
                )
                return
            eswitch = Eswitch(self.queue, 1 << adapter.general["log_max_l2_table"])
            await eswitch.open()
        except CommandError as error:
            log.warning("%s: no way for its functions' frames: %s", self.host.name, error)
            return
        self._eswitch = eswitch
        queue.on(events.NIC_VPORT_CHANGE, eswitch.on_change)

    async def stop(self) -> None:
        """Lead it back, in order as long as it obeys."""
        self._watch_scope.cancel()
        orderly = self.queue.failure is None and self._adapter is not None
        limit = trio.CancelScope()
        self.nursery.start_soon(self._limit, limit)
        try:
            if orderly:
                await self._end_in_order()
        except VfuServerError as error:
            log.warning("%s: ending it: %s", self.host.name, error)
            orderly = False
        limit.cancel()
        if not orderly:
            try:
                await self.host.reset()
            except HostError as error:
                log.warning("%s: it cannot be reset: %s", self.host.name, error)
        try:
            self.host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, self._command & ~PCI_COMMAND_MASTER)
            await self._forget()
        except VfuServerError as error:
            log.debug("%s: giving its memory back: %s", self.host.name, error)

    async def _limit(self, scope: trio.CancelScope) -> None:
        """A command cannot be cancelled, but it ends when the queue is failed."""
        with scope:
            await trio.sleep(STOP_SECONDS)
            self.queue.fail(PfDeadError(f"{self.host.name}: it did not end within {STOP_SECONDS} s"))

    async def _end_in_order(self) -> None:
        for function in list(self._functions.values()):
            await self.detach(function)
        if self._eswitch is not None:
            await self._eswitch.close()
        self._watching.cancel()
        if self.events is not None:
            await self.events.close()
        await self.queue.call(DEALLOC_UAR, uar=self.uar)
        await boot.bring_down(self.queue, self.pages)

    async def _reset(self) -> None:
        """The function's reset, behind which it uses no memory of ours."""
        self._watching.cancel()
        self.queue.fail(PfDeadError(f"{self.host.name}: it is being reset"))
        await self.host.reset()
        await self._forget()

    async def _forget(self) -> None:
        """Drop what the device had: it was reset, or never got so far."""
        self._watching.cancel()
        self._adapter, self._eswitch = None, None
        if self.events is not None:
            await self.events.release()
            self.events = None
        await self.queue.close()
        await self.pages.forget_all()

    # watching

    async def _run_events(self, queue: EventQueue, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await queue.run()
            except VfuServerError as error:
                log.error("%s: its events cannot be read: %s", self.host.name, error)
                self.queue.fail(PfDeadError(f"the physical function {self.host.name} is gone: {error}"))

    async def _on_page_request(self, event: bytes) -> None:
        await self.pages.on_request(
            EQE.get(event, "func_id"),
            signed(EQE.get(event, "num_pages")),
            release_all=bool(EQE.get(event, "release_all")),
        )

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Look at the health buffer; bring the function up again if it has died."""
        with scope:
            while True:
                await trio.sleep(HEALTH_EVERY)
                try:
                    if why := self._dead():
                        self._health = -1, 0
                        await self._recover(why)
                except DeviceGoneError as error:
                    self.queue.fail(PfDeadError(f"the physical function is gone: {error}"))
                    return
                except VfuServerError as error:
                    log.error("%s: it stays dead: %s", self.host.name, error)
                    return

    def _dead(self) -> str:
        """Why it has to be reset; empty: it lives, or only one look has failed. DeviceGoneError."""
        if (failure := self.queue.failure) is not None:
            return str(failure)
        if self.queue.exhausted:
            return "all entries of its command queue are with commands that never completed"
        last, misses = self._health
        count, said = last, ""
        try:
            if why := self.segment.fatal():
                return why
            count = self.segment.field("health_counter", "health_counter")
            said = f"its health counter stands still at {count:#x}"
        except DeviceGoneError:
            raise
        except HostError as error:
            said = f"its health cannot be read: {error}"
        misses = misses + 1 if count == last else 0
        self._health = count, misses
        return said if misses >= MISSES else ""

    async def _recover(self, why: str) -> None:
        """Reset it and bring it up again. Its virtual functions have lost their state."""
        log.error("the physical function %s is dead: %s; resetting it", self.host.name, why)
        self.queue.fail(PfDeadError(f"the physical function {self.host.name} is dead: {why}"))
        self.generation += 1
        for attempt in range(1, RECOVERIES + 1):
            try:
                async with self._lock:
                    await self._reset()
                    await self._start_once()
                    for function in self._functions.values():
                        await self._enable(function)
            except DeviceGoneError:
                raise
            except VfuServerError as error:
                self.queue.fail(PfDeadError(f"the physical function {self.host.name} is dead: {error}"))
                if attempt == RECOVERIES:
                    raise
                log.warning("%s: attempt %d to bring it up again: %s", self.host.name, attempt, error)
                await trio.sleep(attempt)
            else:
                log.warning("%s: it is up again; its virtual functions have to be reset", self.host.name)
                return

    # virtual functions

    async def attach(self, index: int, user: str) -> VirtualFunction:
        """Take virtual function `index` into use. HostError: there is no such one, or it is in use."""
        async with self._lock:
            if (other := self._functions.get(index)) is not None:
                raise HostError(f"virtual function {index} of {self.host.name} is used by {other.user} already")
            function = VirtualFunction(index, user, 0, ())
            try:
                await self._enable(function)
            except HostError as error:
                raise HostError(f"virtual function {index} of {self.host.name}: {error}", error.errno) from error
            self._functions[index] = function
            return function

    async def _enable(self, function: VirtualFunction) -> None:
        number = function.index + 1
        migratable = await self._make_migratable(number)
        if self._eswitch is not None:
            try:
                await self._eswitch.add(number)
            except CommandError as error:
                log.warning("%s: no way for the frames of function %d: %s", self.host.name, function.index, error)
        await self.queue.call(ENABLE_HCA, function_id=number)
        own = await query_caps(self.queue, CAP_GENERAL, GENERAL, function=number)
        function.vhca_id = own["vhca_id"]
        function.missing = gate.missing(self.adapter, migratable)

    async def _make_migratable(self, number: int) -> bool:
        """Set the function's own bit, if it is not set already; before it is enabled. Returns whether it is."""
        adapter = self.adapter
        if not adapter.general["hca_cap_2"]:
            return False
        try:
            caps = await query_caps(self.queue, CAP_GENERAL_2, GENERAL_2, MODE_MAX, number)
            if caps["migratable"] or not adapter.general["vhca_resource_manager"]:
                return bool(caps["migratable"])
            block = bytearray(caps.data)
            GENERAL_2["migratable"].put(block, 1)
            await set_caps(self.queue, CAP_GENERAL_2, bytes(block), number)
            return bool((await query_caps(self.queue, CAP_GENERAL_2, GENERAL_2, MODE_MAX, number))["migratable"])
        except CommandError as error:
            log.warning("%s: the migratable bit of function %d: %s", self.host.name, number - 1, error)
            return False

    async def detach(self, function: VirtualFunction) -> None:
        """It is not used any more."""
        async with self._lock:
            if self._functions.get(function.index) is not function:
                return
            del self._functions[function.index]
            number = function.index + 1
            if self._eswitch is not None:
                try:
                    await self._eswitch.remove(number)
                except HostError as error:
                    log.debug("%s: vport %d: %s", self.host.name, number, error)
            await self.queue.call(DISABLE_HCA, function_id=number)
            stay = await self.pages.reclaim(number, VF_RECLAIM_PATIENCE)
            if stay:
                log.info("%s: function %d keeps %d pages until the end", self.host.name, function.index, stay)
