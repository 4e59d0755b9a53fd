"""One device and its clients, one after another: joins the pump, the door, the plugin and the migration task.

It must not know where the device or the clients come from, nor other devices.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import trio

from vfu_server import uapi
from vfu_server.device import Device
from vfu_server.errors import DeviceGoneError, HostError, VfuServerError
from vfu_server.host_device import HostDevice, MmapArea, RegionInfo
from vfu_server.libvfio_user.context import Connected, Context, Disconnected, Fault, Message, Notice
from vfu_server.libvfio_user.trace import Trace
from vfu_server.region import Areas, MmapMode, compile_rules, mmap_areas, shown_regions
from vfu_server.session_config import flr_bits
from vfu_server.session_counts import Mistakes, SessionStatistics
from vfu_server.session_dirty import DirtyLog
from vfu_server.session_load import Load
from vfu_server.session_machine import Machine
from vfu_server.session_memory import ClientMemory
from vfu_server.session_messages import Messages
from vfu_server.session_migration import Migration
from vfu_server.session_peers import Peers, client_process
from vfu_server.session_refuse import refuse_client
from vfu_server.session_revoke import Revocation
from vfu_server.session_save import Save
from vfu_server.uapi import Command, MigState, RegionIndex

log = logging.getLogger(__name__)

RECLAIM_DEADLINE = 3.0
"""Seconds to bring the device back when its client has gone."""
UNMAP_DEADLINE = 1.0
"""Seconds more for its memory, which is unmapped also from a device that did not come back."""
RELEASE_DEADLINE = 0.5
RELAY_TIMEOUT = 4.0


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """The operator's choices for a device, as the options of those names.

    `mmap` is a MmapMode, `dirty_tracking` 'auto' or 'all'.
    """

    mmap: str = "plugin"
    dirty_tracking: str = "auto"
    revoke: bool = False
    allow_p2p: bool = False


class Session:
    """A device that is presented. `run` serves until cancelled; `shutdown` gives everything back."""

    def __init__(
        self,
        *,
        name: str,
        host: HostDevice,
        device: Device,
        plugin_name: str,
        plugin_version: str,
        options: SessionOptions,
        trace: Trace | None = None,
        peers: Peers | None = None,
        machine: Machine | None = None,
    ) -> None:
        """`trace` takes down every access; it is closed by whoever opened it, after `shutdown`. `peers` is shared with
        the other sessions of the process, `machine` with those of the same virtual machine.
        """
        self._machine = Machine(name, [name]) if machine is None else machine
        self._machine.join(name, device.capabilities)
        self._host = host
        self._device = device
        self._trace = trace
        self._mistakes = Mistakes()
        self._statistics_failed = False
        self._clients = 0
        self._touched = False
        """The present client has negotiated: whatever it did since, the device needs a reset."""
        self._refused = ""
        """Why no further client is served, if the device could not be brought back."""
        mode = MmapMode.parse(options.mmap)
        regions = shown_regions(host.regions, device.region_sizes)
        self.mapped = mmap_areas(device.policy, regions, mode)
        """The areas that clients may map, by region."""
        revocation = Revocation(host, wanted=options.revoke, mapped=bool(self.mapped))
        self._context = _context(name, host, device, regions, mode, self.mapped, trace)
        ring = self._context.ring
        self._save = Save(host, device, ring, plugin_name, plugin_version, revocation)
        self._load = Load(host, device, ring, plugin_name)
        self._migration = Migration(name, device, self._context, self._save, self._load, revocation, self._machine)
        self._name = name
        self._peers = Peers() if peers is None else peers
        p2p = options.allow_p2p and device.capabilities.p2p
        if options.allow_p2p and not p2p:
            log.warning("--allow-p2p: the plugin does not say that this device can hold its DMA to others back")
        self._memory = ClientMemory(name, host, self._context, self._peers, p2p=p2p, loading=self._is_loading)
        self._dirty = DirtyLog(host, options.dirty_tracking, self._memory, device.dirty_log)
        self._messages = Messages(host, device, self._migration, self._dirty, self._memory)
        self._tasks: trio.Nursery | None = None
        """For what the plugin does beside a client, and may not end with it."""
        self._idle = trio.Event()
        self._idle.set()
        self._revocation = revocation
        self._gone: DeviceGoneError | None = None
        self._relays = 0
        host.relay = self._relay

    @property
    def mig_state(self) -> MigState:
        """The device's migration state."""
        return self._migration.state

    def _is_loading(self) -> bool:
        return self._migration.state is MigState.RESUMING

    @property
    def refused(self) -> str:
        """Why the device could not be brought back and no further client is served; empty if all is well."""
        return self._refused

    def statistics(self) -> SessionStatistics:
        """Counters since the session began."""
        counts = self._migration.counts
        return SessionStatistics(
            context=self._context.statistics(),
            mistakes=self._mistakes.counts(),
            clients=self._clients,
            state=self._migration.state,
            arcs=counts.arcs(),
            bytes_saved=counts.bytes_saved,
            bytes_loaded=counts.bytes_loaded,
            resets=counts.resets,
            overruns=self._save.task.overruns + self._load.task.overruns,
            relays=self._relays,
            host=self._host.statistics(),
            plugin=self._plugin_statistics(),
            trace=None if self._trace is None else self._trace.numbers(),
        )

    def _plugin_statistics(self) -> dict[str, int]:
        try:
            return {str(name): int(value) for name, value in self._device.statistics().items()}
        except Exception:
            log.log(
                logging.DEBUG if self._statistics_failed else logging.ERROR, "the plugin's statistics", exc_info=True
            )
            self._statistics_failed = True
            return {}

    async def run(self, accept: Callable[[], Awaitable[int]]) -> None:
        """Serve the clients that `accept` gives (connected sockets), until cancelled or `accept` raises EndOfChannel.

        Raises DeviceGoneError when the device is lost and its last client has gone.
        """
        can = self._device.capabilities
        await self._machine.complete()
        if refusal := self._machine.refusal(self._name) if can.migratable else can.reason:
            log.warning("this device is presented but cannot be migrated: %s", refusal)
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            nursery.start_soon(self._watch_host)
            await self._dirty.find_source()
            with contextlib.suppress(trio.EndOfChannel):
                while True:
                    await self._next_client(nursery, await accept())
            await self._idle.wait()
            nursery.cancel_scope.cancel()

    async def shutdown(self) -> None:
        """Free what is left; the device was brought to rest when its client's service was cancelled."""
        self._context.detach()
        await trio.to_thread.run_sync(self._context.close)

    # clients

    async def _next_client(self, nursery: trio.Nursery, sock_fd: int) -> None:
        # A client that has hung up may still have messages unread: it is served to its end before the next one.
        if not self._idle.is_set() and self._context.peer_gone():
            with trio.move_on_after(RECLAIM_DEADLINE):
                await self._idle.wait()
        if self._idle.is_set() and self._refused and not self._gone:
            await self._reclaim()  # what failed once, on a busy machine, need not fail again
        if not self._idle.is_set():
            log.warning("a second client was refused: one is being served")
            nursery.start_soon(refuse_client, sock_fd, errno.EBUSY)
        elif self._refused or self._gone:
            log.error("a client was refused: %s", self._refused or self._gone)
            nursery.start_soon(refuse_client, sock_fd, errno.ENODEV)
        else:
            self._idle = trio.Event()
            nursery.start_soon(self._serve, sock_fd, self._idle)

    async def _serve(self, sock_fd: int, idle: trio.Event) -> None:
        self._clients += 1
        self._touched = self._messages.precopy_flags = False
        self._messages.notice.renew()
        self._peers.connect(self._name, self._host, client_process(sock_fd))
        self._machine.present(self._name, self._migration.state)
        try:
            self._context.attach(sock_fd)
            async with trio.open_nursery() as nursery:
                self._save.attach(self._tasks)
                self._load.attach(self._tasks)
                await self._pump_events(nursery)
                nursery.cancel_scope.cancel()
        except OSError as error:  # of `attach`: this client cannot be served, the device is none the worse for it
            log.error("a client could not be served: %s", error.strerror)
        finally:
            self._save.attach(None)
            self._load.attach(None)
            self._context.detach()
            self._peers.disconnect(self._name)
            with trio.CancelScope(shield=True):  # each part of it has its own deadline
                await trio.to_thread.run_sync(self._context.join)
                for event in self._context.events():
                    if isinstance(event, Message):
                        _close_all(event.fds)
                    self._touched = self._touched or isinstance(event, Connected)
                await self._reclaim()
            self._machine.present(self._name, None)
            idle.set()
        if self._gone:
            raise self._gone

    async def _pump_events(self, nursery: trio.Nursery) -> None:
        """Handle what the pump tells, until the connection is over."""
        while True:
            await trio.lowlevel.wait_readable(self._context.fileno())
            for event in self._context.events():
                match event:
                    case Message():
                        nursery.start_soon(self._handle, event)
                    case Connected():
                        self._touched = True
                        log.info("client connected")
                    case Disconnected(reason):
                        self._tell_end(reason)
                        return
                    case Notice(text):
                        self._mistake(text)
                    case Fault(error, where):
                        log.error("the plugin failed at a trapped %s: %r", where, error, exc_info=error)

    def _tell_end(self, reason: str) -> None:
        """The client has gone. Whoever did not even negotiate shall not fill the log; whoever goes amid a migration is
        missed.
        """
        state = self._migration.state
        level = logging.INFO if state in (MigState.RUNNING, MigState.STOP) else logging.WARNING
        log.log(level if self._touched else logging.DEBUG, "client disconnected in state %s: %s", state.name, reason)

    async def _handle(self, message: Message) -> None:
        error, payload = 0, b""
        try:
            payload = await self._messages.handle(message)
        except VfuServerError as failed:
            error = failed.errno
            self._mistake(f"{message.command.name}: {failed}")
        except Exception:
            error = errno.EIO
            log.exception("%s failed", message.command.name)
        finally:
            _close_all(message.fds)
        self._context.reply(payload, error)

    def _mistake(self, text: str) -> None:
        """Log a kind of mistake once, count all of them."""
        log.log(logging.WARNING if self._mistakes.note(text) else logging.DEBUG, "%s", text)

    async def _reclaim(self) -> None:
        """Bring the device back from a client that has gone: interrupts off, DMA stopped, memory unmapped, state
        RUNNING.
        """
        self._refused = ""
        with trio.move_on_after(RELEASE_DEADLINE), contextlib.suppress(HostError):
            await self._messages.release_irqs()
            await self._dirty.stop()
        if self._touched and not self._gone:
            await self._bring_back()
        try:
            with trio.fail_after(UNMAP_DEADLINE):
                await self._memory.forget()
        except (HostError, trio.TooSlowError) as error:
            why = str(error) or f"it took longer than {UNMAP_DEADLINE:g} s"
            # The next client's device must not reach it.
            self._refused = self._refused or f"the last client's memory could not be unmapped: {why}"
            log.error("%s", self._refused)

    async def _bring_back(self) -> None:
        """Reset the device; `refused` says why, if that failed."""
        try:
            with trio.fail_after(RECLAIM_DEADLINE), self._revocation.lifted():
                await self._stop_dma()
                await self._migration.reset()
        except (VfuServerError, trio.TooSlowError) as error:
            why = str(error) or f"it took longer than {RECLAIM_DEADLINE:g} s"
            self._refused = f"the device could not be brought back after its last client: {why}"
            log.error("%s", self._refused)

    async def _stop_dma(self) -> None:
        """Take bus mastering away: what a reset leaves alive must not reach memory that is about to be unmapped."""
        command = self._host.read(RegionIndex.CONFIG, uapi.PCI_COMMAND, 2)
        if command & uapi.PCI_COMMAND_MASTER:
            self._host.write(RegionIndex.CONFIG, uapi.PCI_COMMAND, 2, command & ~uapi.PCI_COMMAND_MASTER)

    # the device's side

    async def _watch_host(self) -> None:
        async for event in self._host.events():
            if event.kind == "gone":
                self._gone = DeviceGoneError(f"the device is gone: {event.message}")
                log.error("%s, in state %s", self._gone, self._migration.state.name)
                await self._migration.lose(self._gone)
            else:
                log.warning("the device says: %s %s", event.kind, event.message)
        # Its client is served on: a VMM does not survive the loss of its server, but it survives a dead device.
        if self._gone and self._idle.is_set():
            raise self._gone

    async def _relay(self, command: Command, payload: bytes) -> bytes:
        """Send a DMA message of the device's server on to the client, if it is for memory that the client has shared
        so.
        """
        if len(payload) < uapi.DMA_ACCESS.size:
            raise OSError(errno.EINVAL, "too short")
        iova, count = uapi.DMA_ACCESS.unpack_from(payload)
        needed = uapi.DMA_FLAG_WRITE if command is Command.DMA_WRITE else uapi.DMA_FLAG_READ
        at = iova
        for m in self._host.native.dma_maps(iova, max(count, 1)):
            if m.iova > at or not m.prot & needed:
                break
            at = m.iova + m.size
        if not 0 < count <= uapi.MAX_DATA_XFER_SIZE or at < iova + count:
            raise OSError(errno.EFAULT, "not mapped by the client")
        self._relays += 1
        return await trio.to_thread.run_sync(self._context.request, command, payload, RELAY_TIMEOUT)


def _context(
    name: str,
    host: HostDevice,
    device: Device,
    shown: Sequence[RegionInfo],
    mode: MmapMode,
    areas: Areas,
    trace: Trace | None,
) -> Context:
    policy = device.policy
    sizes = {region.index: region.size for region in shown if region.size}
    can = device.capabilities
    resets = host.can_reset or can.resets
    return Context(
        name=name,
        regions=[_presented(region, areas.get(region.index, ())) for region in shown],
        irqs=host.irqs,
        flags=uapi.DEVICE_FLAGS_PCI | (uapi.DEVICE_FLAGS_RESET if resets else 0),
        rules=compile_rules(policy, mode, sizes, areas),
        door=host.native,
        traps=device,
        flr=flr_bits(host.read_block(RegionIndex.CONFIG, 0, min(uapi.PCI_CFG_SPACE_SIZE, sizes[RegionIndex.CONFIG]))),
        trace=trace,
    )


def _presented(region: RegionInfo, areas: Sequence[MmapArea]) -> RegionInfo:
    flags = region.flags & (uapi.REGION_INFO_FLAG_READ | uapi.REGION_INFO_FLAG_WRITE)
    if not areas:
        return replace(region, flags=flags, areas=(), fd=-1, fd_offset=0)
    return replace(region, flags=flags | uapi.REGION_INFO_FLAG_MMAP, areas=tuple(areas))


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
