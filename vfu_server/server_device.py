"""The life of one served device: model, door, plugin, session, and the way back in the opposite order.

It must not know of other devices, signals or the service manager. Whatever happens to it stays in its task: the
outcome is kept for the server to read.
"""

import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable

import trio

from vfu_server import __version__, logs, server_model
from vfu_server.config import DeviceConfig, Source, SourceKind
from vfu_server.device import Device
from vfu_server.errors import DeviceGoneError, HostError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.metrics import DeviceReport, log_report
from vfu_server.plugins import Plugins, Taken, exactly_one
from vfu_server.region import MmapMode, mmap_areas, shown_regions
from vfu_server.server_companions import CompanionDoors, DeviceCompanions
from vfu_server.server_doors import open_host
from vfu_server.server_stage import CLOSE_DEADLINE, Stage, one_cause
from vfu_server.session import Session, SessionOptions
from vfu_server.session_counts import SessionStatistics
from vfu_server.session_machine import Machine
from vfu_server.session_peers import Peers
from vfu_server.sockets import Listener
from vfu_server.trace_file import TraceFile, clocks
from vfu_server.trace_format import TraceHeader

logger = logging.getLogger(__name__)


class ServedDevice:
    """One device and its task."""

    def __init__(
        self,
        config: DeviceConfig,
        plugins: Plugins,
        listener: Listener,
        peers: Peers,
        companions: CompanionDoors,
        machine: Machine,
    ) -> None:
        self.config = config
        self.listener = listener
        self._peers = peers
        self._companions = companions
        self._machine = machine
        self.stage = Stage.OPENING
        self.failure: Exception | None = None
        """Why it is not served (any more); None after a clean end."""
        self.was_served = False
        """It came as far as being served, so its failure was told when it happened."""
        self.forced = False
        """The way back was cut short: the device is not at rest."""
        self.opened = trio.Event()
        """It is served, or will never be."""
        self._plugins = plugins
        self._taken: Taken | None = None
        self._session: Session | None = None
        self._trace: TraceFile | None = None
        self._statistics: SessionStatistics | None = None
        """The last ones, when the session is over."""
        self.over = False
        """Its task has ended."""
        self._serving = trio.CancelScope()
        self._close_by = float("inf")
        self._model: server_model.ModelProcess | None = None
        self._connection_taken = False

    def check_plugin(self) -> None:
        """Load what the device needs, before anything is started. Raises PluginError, UsageError (no such model)."""
        if self.config.source.kind is SourceKind.MODEL:
            self._plugins.model(self.config.plugin, self.config.source.value)
        else:
            self._plugins.select(self.config.plugin)

    def report(self) -> DeviceReport:
        """How the device stands."""
        found = self._statistics if self._session is None else self._session.statistics()
        who = ("", "") if self._taken is None else _who(self._taken)
        return DeviceReport(self.config.name, str(self.config.source), self.stage.value, *who, found)

    def stop(self) -> None:
        """Begin the way back."""
        self._serving.cancel()

    def abandon(self) -> None:
        """Leave nothing behind that outlives the process: it is about to end at once."""
        self.listener.close()
        if self._model is not None:
            self._model.abandon()

    async def run(self) -> None:
        """Serve until stopped or lost. Raises nothing."""
        logs.DEVICE.set(self.config.name)
        try:
            with self._serving:
                await self._open_and_serve()
            self.stage = Stage.STOPPED
        except Exception as error:  # noqa: BLE001 - one device's fault must not reach the others
            self._keep(one_cause(error))
        finally:
            self.listener.close()
            self.opened.set()
            self.over = True

    def _keep(self, error: Exception) -> None:
        self.failure = error
        self.stage = Stage.LOST if isinstance(error, DeviceGoneError) else Stage.FAILED
        if not self.was_served:
            return  # told by whoever reports why the server does not start
        if isinstance(error, VfuServerError):
            logger.error("the device is no longer served: %s", error)
        else:
            logger.error("the device is no longer served: internal error", exc_info=error)

    async def _open_and_serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self.config.trace_regions:
                self._trace = TraceFile(self.config.trace_regions)
                stack.push_async_callback(self._step_back, "closing the trace", self._close_trace)
            source = await self._find(stack)
            companions = self._companions.of(self.config, source)
            await self._open_beforehand(companions, source, stack)
            host = await open_host(source, self.config)
            stack.push_async_callback(self._step_back, "closing the door", host.aclose)
            taken = self._taken = await self._probe(host)
            stack.push_async_callback(self._step_back, "closing the plugin's device", taken.device.aclose)
            await self._plugins.open(taken, companions)
            self._check_wish(taken.device, host)
            session = self._new_session(host, taken)
            stack.push_async_callback(self._step_back, "bringing the device to rest", session.shutdown)
            stack.callback(self.listener.close)
            logger.info("listening at %s (%s, plugin %s %s)", self.listener.description, host.name, *_who(taken))
            self.stage, self.was_served = Stage.SERVING, True
            self.opened.set()
            self._session = session
            try:
                await self._run(session)
            finally:
                self.forced = self.forced or bool(session.refused)
                self._statistics, self._session = session.statistics(), None
                log_report(self.report(), "statistics at the end")

    async def _run(self, session: Session) -> None:
        async with trio.open_nursery() as nursery:
            if self._trace is not None:
                nursery.start_soon(self._trace.watch)
            await session.run(self._accept)
            nursery.cancel_scope.cancel()

    async def _close_trace(self) -> None:
        if self._trace is not None:
            await trio.to_thread.run_sync(self._trace.close)

    async def _find(self, stack: contextlib.AsyncExitStack) -> Source:
        """Where the device is; a model is started for it."""
        source = self.config.source
        if source.kind is not SourceKind.MODEL:
            return source
        command = self._plugins.model(self.config.plugin, source.value)
        self._model = await stack.enter_async_context(server_model.running(command, self.config.name))
        return Source(SourceKind.DEVICE_SOCKET, self._model.socket_path)

    async def _open_beforehand(
        self, companions: DeviceCompanions, source: Source, stack: contextlib.AsyncExitStack
    ) -> None:
        """Open what the plugin must have before the device: the kernel lets a VF in by a token that its PF has set, and
        opening or closing a PF resets its VFs.
        """
        for where in self._plugins.companions(self.config.plugin, source.value, self.config.options):
            held = companions.hold(where)
            await held.__aenter__()
            leave = functools.partial(held.__aexit__, None, None, None)
            stack.push_async_callback(self._step_back, f"leaving the companion {where}", leave)

    async def _probe(self, host: HostDevice) -> Taken:
        taken = self._plugins.probe(self.config.plugin, host, self.config.options)
        try:
            return exactly_one(taken, self.config.plugin, host)
        except VfuServerError:
            for one in taken:
                await self._step_back("closing a plugin's device", one.device.aclose)
            raise

    def _check_wish(self, device: Device, host: HostDevice) -> None:
        can = device.capabilities
        if self.config.require_migration and not can.migratable:
            raise HostError(f"--require-migration: {host.name} cannot be migrated: {can.reason}")

    def _new_session(self, host: HostDevice, taken: Taken) -> Session:
        return Session(
            name=self.config.name,
            host=host,
            device=taken.device,
            plugin_name=taken.plugin.name,
            plugin_version=taken.plugin.version,
            options=SessionOptions(
                mmap=self.config.mmap,
                dirty_tracking=self.config.dirty_tracking,
                revoke=self.config.revoke,
                allow_p2p=self.config.allow_p2p,
            ),
            peers=self._peers,
            machine=self._machine,
            trace=None if self._trace is None else self._trace.begin(self._trace_header(host, taken)),
        )

    def _trace_header(self, host: HostDevice, taken: Taken) -> TraceHeader:
        identity, (wall, monotonic) = host.identity(), clocks()
        regions = shown_regions(host.regions, taken.device.region_sizes)
        mapped = mmap_areas(taken.device.policy, regions, MmapMode.parse(self.config.mmap))
        areas = [(region, area.offset, area.size) for region, found in mapped.items() for area in found]
        if areas:
            logger.warning("--trace-regions: clients may map areas, whose accesses nobody sees: use --mmap never")
        return TraceHeader(
            server=__version__,
            device=self.config.name,
            plugin=taken.plugin.name,
            variant=taken.device.identity.variant,
            vendor=identity.vendor,
            device_id=identity.device,
            wall_ns=wall,
            monotonic_ns=monotonic,
            mapped=areas,
        )

    async def _accept(self) -> int:
        """The next client. `trio.EndOfChannel`: there will be no other (an inherited connection is one client)."""
        if not self.listener.one_client:
            return await self.listener.accept()
        if self._connection_taken:
            raise trio.EndOfChannel
        self._connection_taken = True
        return self.listener.take_connection()

    async def _step_back(self, what: str, step: Callable[[], Awaitable[object]]) -> None:
        """One step of the way back: also when cancelled, but not for ever. If it fails, the next is still done."""
        if self._close_by == float("inf"):
            self._close_by = trio.current_time() + CLOSE_DEADLINE
        with trio.CancelScope(deadline=self._close_by, shield=True) as scope:
            try:
                await step()
            except Exception as error:
                fault = one_cause(error)
                logger.warning("%s: %s", what, fault, exc_info=None if isinstance(fault, VfuServerError) else fault)
        if scope.cancelled_caught:
            self.forced = True
            logger.error("%s was cut short", what)


def _who(taken: Taken) -> tuple[str, str]:
    return taken.plugin.name, taken.plugin.version
