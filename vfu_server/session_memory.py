"""The client's memory as the device reaches it: the DMA maps and unmaps that C did not decide by itself.

It must not know who the client is. What a map is, `dma` decides; here it is done, told once, and remembered where it
bars migration.
"""

import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Sequence

import trio

from vfu_server import dma, uapi
from vfu_server.dma import MapKind
from vfu_server.errors import ClientError, DeadlineError, HostError
from vfu_server.host_device import DmaMap, HostDevice
from vfu_server.libvfio_user.context import Context, Message
from vfu_server.libvfio_user.door import MAX_DMA_MAPS
from vfu_server.session_peers import Peers

log = logging.getLogger(__name__)

LENT_DEADLINE = 3.0
"""Seconds that a map or unmap waits for scratch memory to go."""

EVERYTHING = (1 << 64) - 1

Collect = Callable[[Sequence[DmaMap]], Awaitable[None]]
"""Takes what is still to be known of maps that are about to go. Raises nothing."""


class ClientMemory:
    """The odd maps of one client. `unreachable` is the guest memory that the hardware can never reach, by iova.

    `p2p`: the operator allows, and the plugin can answer for, DMA to other devices. `loading`: a state is coming in,
    and with it where the guest has its BARs.
    """

    def __init__(
        self,
        name: str,
        host: HostDevice,
        context: Context,
        peers: Peers,
        *,
        p2p: bool = False,
        loading: Callable[[], bool] = bool,
    ) -> None:
        self._name = name
        self._host = host
        self._context = context
        self._peers = peers
        self._p2p = p2p
        self._loading = loading
        self._told: set[str] = set()
        self.unreachable: dict[int, int] = {}
        self._peer_maps: dict[int, int] = {}
        """Maps of other devices' memory that were made, by iova: their sizes."""
        self._collect: Collect | None = None

    def watch_unmaps(self, collect: Collect | None) -> None:
        """Have `collect` called before memory is unmapped, from the next message of the client on; None: not any more.

        Only from the handler of a message, or without a client: no unmap is under way then.
        """
        self._collect = collect
        self._route_unmaps()

    def writable(self, iova: int = 0, size: int = EVERYTHING) -> list[DmaMap]:
        """Guest memory that touches the range and that the device may write."""
        found = self._host.native.dma_maps(iova, min(size, EVERYTHING))
        return [m for m in found if m.prot & uapi.DMA_FLAG_WRITE and m.iova not in self._peer_maps]

    def out_of_reach(self) -> bool:
        """There is guest memory that the hardware cannot reach, by where BARs are now."""
        bars = self._peers.bars(self._name, self._host) if self.unreachable else ()
        for iova, size in tuple(self.unreachable.items()):
            decision = dma.decide_map(DmaMap(iova, size, uapi.DMA_FLAG_READ | uapi.DMA_FLAG_WRITE), bars)
            self._tell_once(decision.kind.value, decision.text)
            if decision.kind is not MapKind.UNREACHABLE:
                del self.unreachable[iova]
        self._route_unmaps()
        return bool(self.unreachable)

    async def forget(self) -> None:
        """The client has gone: unmap everything. HostError if that failed."""
        self._forget_odd_maps(0, EVERYTHING + 1)
        await self._host.dma_unmap_all()

    async def map(self, message: Message) -> bytes:
        """A DMA_MAP without fd, with an odd one, or one that C could not make."""
        await self._settled()
        fd = message.fds[0] if message.fds else -1
        wanted = dma.parse_dma_map(message.payload, fd)
        if message.tried:
            raise self._failed(wanted, message.tried)
        if fd < 0 and self._host.dma_by_messages:
            await self._make(wanted)
            if wanted.prot & uapi.DMA_FLAG_WRITE:
                self._tell_once(
                    "messages", f"{_where(wanted)} came without a file descriptor: {_BY_MESSAGES}{dma.CURE}"
                )
            return b""
        memory_fd = fd >= 0 and stat.S_ISREG(os.fstat(fd).st_mode)
        device_fd = self._p2p and fd >= 0 and not memory_fd and await self._host.is_peer(fd)
        bars = self._peers.bars(self._name, self._host) if fd < 0 else ()
        decision = dma.decide_map(wanted, bars, memory_fd=memory_fd, p2p=device_fd)
        # A BAR that the guest has placed at the source is none here yet: `out_of_reach` looks again.
        if decision.text and not (decision.kind is MapKind.UNREACHABLE and self._loading()):
            self._tell_once(decision.kind.value, decision.text)
        if decision.into_iommu:
            await self._make(wanted, decision.kind)
        elif decision.kind is MapKind.UNREACHABLE:
            self._note_unreachable(wanted)
        return b""

    async def _settled(self) -> None:
        """Wait while a save or a load has memory of the server's in the client's address space."""
        with trio.move_on_after(LENT_DEADLINE):
            await self._host.native.settled.wait()
            return
        raise DeadlineError(f"the device uses memory of the server's for longer than {LENT_DEADLINE} s", errno.EBUSY)

    async def _make(self, wanted: DmaMap, kind: MapKind = MapKind.MEMORY) -> None:
        try:
            await self._host.dma_map(wanted)
        except HostError as error:
            raise self._failed(wanted, error.errno, kind) from error
        if kind is MapKind.P2P:
            self._peer_maps[wanted.iova] = wanted.size
            self._route_unmaps()

    def _failed(self, wanted: DmaMap, error: int, kind: MapKind = MapKind.MEMORY) -> HostError:
        maps = self._host.statistics().dma_maps
        return HostError(dma.explain_map_failure(wanted, error, maps, kind), error)

    def _note_unreachable(self, wanted: DmaMap) -> None:
        if len(self.unreachable) >= MAX_DMA_MAPS:
            raise self._failed(wanted, errno.ENOSPC, MapKind.UNREACHABLE)
        self.unreachable[wanted.iova] = max(wanted.size, self.unreachable.get(wanted.iova, 0))
        self._route_unmaps()

    async def unmap(self, message: Message) -> bytes:
        """A DMA_UNMAP that came up: memory of ours is lent, a log must know first, or odd maps may go."""
        await self._settled()
        wanted = dma.parse_dma_unmap(message.payload, uapi.MAX_DATA_XFER_SIZE)
        if wanted.page_size:
            raise ClientError("DMA_UNMAP with a dirty bitmap: ask by DMA_LOGGING_REPORT before the unmap")
        iova, size = (0, EVERYTHING + 1) if wanted.everything else (wanted.iova, wanted.size)
        if self._collect is not None:
            inside = (m for m in self.writable(iova, size) if iova <= m.iova and m.iova + m.size <= iova + size)
            await self._collect(tuple(inside))
        if wanted.everything:
            await self._host.dma_unmap_all()
        else:
            await self._host.dma_unmap(iova, size)
        self._forget_odd_maps(iova, size)
        return message.payload[: uapi.DMA_UNMAP.size]

    def _forget_odd_maps(self, iova: int, size: int) -> None:
        for odd in (self.unreachable, self._peer_maps):
            for at in [at for at, n in odd.items() if iova <= at and at + n <= iova + size]:
                del odd[at]
        self._route_unmaps()

    def _route_unmaps(self) -> None:
        """C makes unmaps by itself unless somebody here has to know of them."""
        self._context.unmaps_to_python(bool(self.unreachable or self._peer_maps or self._collect))

    def _tell_once(self, kind: str, text: str) -> None:
        log.log(logging.DEBUG if kind in self._told else logging.WARNING, "%s", text)
        self._told.add(kind)


_BY_MESSAGES = "each DMA to it is a message to the client, which is slow; "


def _where(wanted: DmaMap) -> str:
    return f"guest memory at {wanted.iova:#x}+{wanted.size:#x}"
