"""One function and its clients, one after another: trio's side of a model's process.

It moves events of the Context to the function and back. It must not know what the model is.
"""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Sequence

import trio

from vfu_server import uapi
from vfu_server.errors import VfuServerError
from vfu_server.host_device import DmaMap
from vfu_server.libvfio_user.context import Connected, Context, Disconnected, Event, Fault, Message, Notice
from vfu_server.model_server.function import Function
from vfu_server.region import MmapMode, compile_rules
from vfu_server.uapi import Command, HeaderFlag

logger = logging.getLogger(__name__)

LEAVING_SECONDS = 2.0
"""How long a new client waits for one that has hung up to be cleared away."""
REFUSAL_SECONDS = 1.0
ACCEPT_PAUSE = 0.1


class ModelServer:
    """Serves `function` to one client at a time: `run` until cancelled, then `end` and `close`.

    They are apart since a model may reach into other functions of its process: `close` the first when all are ended.
    """

    def __init__(self, name: str, function: Function) -> None:
        self._function = function
        flags = uapi.DEVICE_FLAGS_PCI | (uapi.DEVICE_FLAGS_RESET if function.model.can_reset else 0)
        sizes = {region.index: region.size for region in function.regions if region.size}
        self._context = Context(
            name=name,
            regions=function.regions,
            irqs=function.irqs,
            flags=flags,
            rules=compile_rules(function.policy, MmapMode.NEVER, sizes),
            door=function.memory.door,
            traps=function,
        )
        function.memory.requester = self._context
        self._idle = trio.Event()
        self._idle.set()
        self._resample = _ResampleWatch(function)

    async def run(self, listener: socket.socket) -> None:
        """Serve clients that come to `listener`, a listening UNIX socket, until cancelled."""
        self._function.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._relay)
            nursery.start_soon(self._resample.run)
            nursery.start_soon(self._accept, trio.socket.from_stdlib_socket(listener), nursery)

    def end(self) -> None:
        """No access of the client comes any more, and no callback of the model's. Idempotent."""
        self._context.detach()
        self._context.join()
        self._function.stop()

    def close(self) -> None:
        """Give everything back. Nobody may use the function or its bus any more."""
        self._context.close()
        self._function.close()

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                client, _ = await listener.accept()
            except OSError as error:  # out of fds, or the client has given up
                logger.warning("cannot accept a client: %s", error.strerror)
                await trio.sleep(ACCEPT_PAUSE)
                continue
            if self._context.peer_gone():
                with trio.move_on_after(LEAVING_SECONDS):
                    await self._idle.wait()
            if not self._idle.is_set():
                nursery.start_soon(_refuse, client)
                continue
            try:
                self._context.attach(client.detach())
            except OSError as error:
                logger.warning("cannot serve a client: %s", error.strerror)
                continue
            self._idle = trio.Event()

    async def _relay(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._context.fileno())
            for event in self._context.events():
                self._event(event)

    def _event(self, event: Event) -> None:
        match event:
            case Connected(max_data_xfer_size=size):
                self._function.memory.max_transfer = size
            case Disconnected(reason=reason):
                logger.info("the client has gone: %s", reason)
                self._context.join()
                self._function.bus_reset()
                self._resample.update()
                self._idle.set()
            case Notice(text=text):
                logger.info("%s", text)
            case Fault(error=error, where=where):
                logger.error("%s", where, exc_info=error)
            case Message():
                self._answer(event)

    def _answer(self, message: Message) -> None:
        fds = list(message.fds)
        try:
            if message.command == Command.DEVICE_SET_IRQS:
                given, fds = fds, []
                self._function.set_irqs(message.payload, given)
                self._resample.update()
                self._context.reply()
            elif message.command == Command.DMA_MAP:
                self._map(message.payload, fds)
                self._context.reply()
            elif message.command == Command.DEVICE_RESET:
                self._context.reply(error=0 if self._function.reset() else errno.EINVAL)
            elif message.command == Command.DEVICE_FEATURE:
                self._context.reply(error=errno.ENOTTY)
            else:
                self._context.reply(error=errno.EINVAL)
        except (VfuServerError, OSError) as error:
            logger.info("%s: %s", message.command.name, error)
            self._context.reply(error=error.errno or errno.EIO)
        finally:
            for fd in fds:
                os.close(fd)

    def _map(self, payload: bytes, fds: Sequence[int]) -> None:
        """A map that C leaves to us: without fd, or whose fd is no file (a peer's BAR): reached by messages."""
        _, flags, offset, iova, size = uapi.DMA_MAP.unpack_from(payload)
        if flags & ~(uapi.DMA_FLAG_READ | uapi.DMA_FLAG_WRITE):
            raise OSError(errno.EINVAL, f"DMA_MAP with flags {flags:#x}")
        if fds:
            with contextlib.suppress(OSError):
                self._function.memory.door.dma_map(DmaMap(iova, size, flags, fds[0], offset))
                return
        self._function.memory.door.dma_map(DmaMap(iova, size, flags))


class _ResampleWatch:
    """Waits for the client's eventfd that unmasks INTx; on a copy of it, which may be closed when we want."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._changed = trio.Event()
        self._scope = trio.CancelScope()

    def update(self) -> None:
        """The eventfd may have changed."""
        self._changed.set()
        self._scope.cancel()

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            if self._function.resample_fd < 0:
                continue
            fd = os.dup(self._function.resample_fd)
            try:
                with trio.CancelScope() as self._scope:
                    while True:
                        await trio.lowlevel.wait_readable(fd)
                        self._function.resample()
                        await trio.lowlevel.checkpoint()
            finally:
                os.close(fd)


async def _refuse(client: trio.socket.SocketType) -> None:
    """Tell a second client that the device is taken: an error reply to its first message, then the end."""
    with client, trio.move_on_after(REFUSAL_SECONDS), contextlib.suppress(OSError):
        head = await client.recv(uapi.HEADER.size)
        if len(head) == uapi.HEADER.size:
            msg_id, command, _, _, _ = uapi.HEADER.unpack(head)
            flags = HeaderFlag.REPLY | HeaderFlag.ERROR
            await client.send(uapi.HEADER.pack(msg_id, command, uapi.HEADER.size, flags, errno.EBUSY))
    logger.info("a second client was refused")
