"""The process: sockets first, then every device in a nursery of its own, readiness, signals, and the end in order.

It must not know what is done with a client (`session`) nor how the operator's wish was uttered (`cli`, `config_file`).
"""

import faulthandler
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import trio

from vfu_server.config import ServerConfig
from vfu_server.errors import DeviceGoneError, VfuServerError
from vfu_server.exit_codes import ExitCode
from vfu_server.metrics import DeviceReport, log_report
from vfu_server.notify import Notifier
from vfu_server.server_listeners import open_listeners
from vfu_server.server_stage import CLOSE_DEADLINE, Stage
from vfu_server.sockets import Listener

if TYPE_CHECKING:
    from vfu_server.plugins import Plugins
    from vfu_server.server_companions import CompanionDoors
    from vfu_server.server_device import ServedDevice

logger = logging.getLogger(__name__)

SWITCH_INTERVAL = 1e-4
"""Seconds after which a busy Python thread lets a waiting one run: what a TRAP waits at worst (5 ms by default)."""

FORCE_AFTER = CLOSE_DEADLINE + 2.0
"""Seconds after the signal at which the process ends, whoever is still waited for."""
STUCK_AFTER = FORCE_AFTER + 2.0
"""The same if not even the event loop goes on."""

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TELL_SIGNAL = signal.SIGUSR1


def run(config: ServerConfig, plugins: "Plugins | None" = None) -> ExitCode:
    """Serve until a signal or until no device is left. Raises what kept the server from starting.

    `plugins`: others than those that are installed, or installed ones that are watched.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    return trio.run(_serve, config, plugins)


async def _serve(config: ServerConfig, plugins: "Plugins | None") -> ExitCode:
    notifier = Notifier.from_environ(os.environ)
    from vfu_server.server_companions import CompanionDoors

    with trio.open_signal_receiver(*END_SIGNALS, TELL_SIGNAL) as signals:
        # Clients may come from here on, and wait a moment: most of the start-up is still ahead.
        listeners = open_listeners(config, os.environ)
        try:
            listeners += _metrics_listeners(config)
            companions = CompanionDoors()
            devices = _devices(config, listeners[: len(config.devices)], companions, plugins)
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        process = _Process(devices, notifier)
        watching = listeners[len(devices) :]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.obey, signals)
                nursery.start_soon(notifier.watchdog)
                await nursery.start(companions.run)
                for listener in watching:
                    nursery.start_soon(_serve_metrics, listener, process)
                await process.serve()
                nursery.cancel_scope.cancel()
        finally:
            faulthandler.cancel_dump_traceback_later()
            for listener in watching:
                listener.close()
        return process.outcome()


def _metrics_listeners(config: ServerConfig) -> list[Listener]:
    """The listener of `--metrics`, or none. Raises UsageError, SocketError."""
    if config.metrics is None:
        return []
    from vfu_server import metrics_listener

    metrics_listener.check_installed()
    return [metrics_listener.open_listener(config.metrics, config.socket_group)]


async def _serve_metrics(listener: Listener, process: "_Process") -> None:
    from vfu_server import metrics_listener
    from vfu_server.metrics_prometheus import renderer

    try:
        await metrics_listener.serve(listener, renderer(process.reports))
    except* OSError as error:  # devices are served on without it
        logger.error("metrics can no longer be read: %s", error.exceptions[0])


def _devices(
    config: ServerConfig, listeners: Sequence[Listener], companions: "CompanionDoors", plugins: "Plugins | None"
) -> list["ServedDevice"]:
    """The devices, not opened yet, their plugins loaded. Raises PluginError, UsageError (no such model)."""
    from vfu_server.plugins import Plugins
    from vfu_server.server_device import ServedDevice
    from vfu_server.session_machine import machines
    from vfu_server.session_peers import Peers

    plugins, peers = plugins or Plugins(), Peers()
    together = machines({device.name: device.machine for device in config.devices})
    devices = [
        ServedDevice(device, plugins, listener, peers, companions, together[device.name])
        for device, listener in zip(config.devices, listeners, strict=True)
    ]
    for device in devices:
        device.check_plugin()
    return devices


class _Process:
    """All devices of this process."""

    def __init__(self, devices: Sequence["ServedDevice"], notifier: Notifier) -> None:
        self._devices = devices
        self._notifier = notifier
        self._ending = False

    async def serve(self) -> None:
        """Until every device has ended. One that cannot be opened ends the others: half a server was not asked for."""
        async with trio.open_nursery() as nursery:
            for device in self._devices:
                nursery.start_soon(self._serve_one, device)
            for device in self._devices:
                await device.opened.wait()
            if any(device.failure for device in self._devices):
                self._stop_all()
            elif not self._ending:
                self._notifier.ready(self._status())
            gc.freeze()
            gc.enable()

    async def _serve_one(self, device: "ServedDevice") -> None:
        await device.run()
        if not self._ending and device.stage is not Stage.OPENING:
            self._notifier.status(self._status())

    def _status(self) -> str:
        by_stage = {stage: [d.config.name for d in self._devices if d.stage is stage] for stage in Stage}
        return "; ".join(f"{stage.value}: {', '.join(names)}" for stage, names in by_stage.items() if names)

    def reports(self) -> list[DeviceReport]:
        """All devices as they stand."""
        return [device.report() for device in self._devices]

    async def obey(self, signals: AsyncIterator[int]) -> None:
        """The first signal ends the server in order, the second one at once; TELL_SIGNAL has the numbers logged."""
        async for number in signals:
            if number == TELL_SIGNAL:
                for report in self.reports():
                    log_report(report)
                continue
            name = signal.Signals(number).name
            if self._ending:
                logger.error("%s, the second signal: ending by force", name)
                for device in self._devices:
                    device.abandon()
                os._exit(ExitCode.FORCED)
            logger.info("%s: bringing devices to rest", name)
            self._stop_all()

    def _stop_all(self) -> None:
        """Begin the end. A call of the kernel, or a plugin that shields its wait, cannot be interrupted: that holds it
        up for FORCE_AFTER at most. If the event loop itself is stuck, a thread of C ends the process and says where.
        """
        self._ending = True
        self._notifier.stopping()
        faulthandler.dump_traceback_later(STUCK_AFTER, exit=True)
        trio.lowlevel.spawn_system_task(self._end_by_force)  # the last to be waited for, and by nobody
        for device in self._devices:
            device.stop()

    async def _end_by_force(self) -> None:
        await trio.sleep(FORCE_AFTER)
        left = [device.config.name for device in self._devices if not device.over]
        text = "%s: not at rest after %g s, by something that cannot be interrupted: ending by force"
        logger.error(text, ", ".join(left), FORCE_AFTER)
        for device in self._devices:
            device.abandon()
        os._exit(ExitCode.FORCED)

    def outcome(self) -> ExitCode:
        """What the process ends with. Raises what kept a device from being opened."""
        failed = [device for device in self._devices if device.failure is not None]
        at_start = [device.failure for device in failed if device.failure and not device.was_served]
        if at_start:
            for failure in at_start[1:]:
                at_start[0].add_note(f"also: {failure}")
            raise at_start[0]
        if any(device.forced and device.stage is not Stage.LOST for device in self._devices):
            return ExitCode.FORCED
        if self._ending or not failed:
            return ExitCode.CLEAN
        if any(not isinstance(device.failure, VfuServerError) for device in failed):
            return ExitCode.INTERNAL
        gone = any(isinstance(device.failure, DeviceGoneError) for device in failed)
        return ExitCode.LOST if gone else ExitCode.DEVICE
