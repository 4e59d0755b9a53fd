"""A load session: what the client writes is checked as it comes in, and written to the hardware only when all of it is
there.

It must not know states or messages: the migration task says when a load begins and when it must be complete.
"""

import logging

import trio

from vfu_server.device import Device
from vfu_server.errors import DeadlineError, MigrationError, PluginError, StreamFormatError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.libvfio_user.ring import Ring
from vfu_server.session_intake import Intake
from vfu_server.session_task import PluginTask

log = logging.getLogger(__name__)

SLICE = 32 << 10
"""Bytes that are read in one go: some milliseconds, if they are records without payload. Payload is read at once."""
TURN = 0.002
"""Seconds after which the other devices, which live in the same thread, get their turn."""


class Load:
    """The loading side of one device. Its task runs in the nursery that `attach` names."""

    def __init__(self, host: HostDevice, device: Device, ring: Ring, plugin_name: str) -> None:
        self._host = host
        self._device = device
        self._ring = ring
        self._plugin_name = plugin_name
        self._nursery: trio.Nursery | None = None
        self.task = PluginTask("load")
        self._intake: Intake | None = None
        """What has come in whole; None before the stream's end."""
        self._error: VfuServerError | None = None

    def attach(self, nursery: trio.Nursery | None) -> None:
        """Tasks begin in `nursery` from now on, which outlives a client; None without one: what runs shall end."""
        self._nursery = nursery
        if nursery is None:
            self.task.cancel()

    async def open(self) -> None:
        """Begin to take a stream."""
        if self._nursery is None:
            raise MigrationError("no client is there to load from")
        await self._device.load_begin()
        self._intake = self._error = None
        self._ring.open_load(judged=True)
        self.task.begin(self._nursery, self._run)

    async def finish(self) -> None:
        """The client says that this was all: check that it was, and write the state to the device.

        Raises what was wrong with the stream (also when it was found long before), StreamMismatchError or RestoreError.
        That is the answer from then on: the state can only be given up by a reset.
        """
        if not self.task.begun:
            raise MigrationError("no state is being loaded")
        self._ring.finish()
        await self.task.wait()
        if self._error is None:
            await self._conclude()
        if self._error is not None:
            raise self._error.with_traceback(None)  # told again and again, it must not grow
        await self.close()

    async def close(self) -> None:
        """End the session; harmless if none is open. StateLostError: the plugin's load goes on all the same."""
        if self.task.begun:
            try:
                await self.task.end()
            finally:
                self._ring.close()

    async def _conclude(self) -> None:
        """All has come in: write it. Once only, since nobody knows what a write that failed has left."""
        began = trio.current_time()
        try:
            if self._intake is None:
                raise StreamFormatError("the stream is not complete")
            await self._intake.write()
        except VfuServerError as error:
            self._refuse(error)
        except trio.Cancelled:
            self._fail(DeadlineError("the state was not written to the device in time"))
            raise
        except Exception as error:
            log.exception("writing the device's state failed in the plugin")
            self._fail(PluginError(f"the plugin could not write the state: {error!r}"))
        else:
            log.info("state written to the device in %.1f ms", (trio.current_time() - began) * 1e3)

    async def _run(self) -> None:
        try:
            await self._load()
        except VfuServerError as error:
            self._refuse(error)
        except Exception as error:
            self._fail(PluginError(f"the plugin could not take the state: {error!r}"))
            log.exception("loading the device's state failed in the plugin")

    def _refuse(self, error: VfuServerError) -> None:
        self._fail(error)  # first: whoever reads the log finds the client's next write refused
        log.error("the state that came in was refused: %s: %s", type(error).__name__, error)

    def _fail(self, error: VfuServerError) -> None:
        self._error = error
        self._ring.fail(error.errno)

    async def _load(self) -> None:
        intake = Intake(self._host, self._device, self._plugin_name)
        turn = trio.current_time()
        while (pieces := await self._ring.look(intake.bulk or SLICE, intake.bulk or 1)) is not None:
            try:
                taken, items = intake.push(pieces)
            finally:
                for piece in pieces:
                    piece.release()
            for item in items:
                await intake.take(item)
            self._ring.consume(taken)  # now, since it is what a small write waits for to be answered
            if trio.current_time() - turn > TURN:
                await trio.lowlevel.checkpoint()
                turn = trio.current_time()
        intake.finish()
        self._intake = intake
