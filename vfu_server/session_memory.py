"""The client's memory as the device reaches it: the DMA maps and unmaps that C did not decide by itself.

It must not know who the client is. What a map is, `dma` decides; here it is done, told once, and remembered where it
bars migration.
"""

import logging
import os
import stat

from vfu_server import dma, uapi
from vfu_server.dma import MapKind
from vfu_server.errors import ClientError, HostError
from vfu_server.host_device import DmaMap, HostDevice
from vfu_server.libvfio_user.context import Context, Message
from vfu_server.uapi import RegionIndex

log = logging.getLogger(__name__)


class ClientMemory:
    """The odd maps of one client. `unreachable` is the guest memory that the hardware can never reach, by iova."""

    def __init__(self, name: str, host: HostDevice, context: Context) -> None:
        self._name = name
        self._host = host
        self._context = context
        self._told: set[str] = set()
        self.unreachable: dict[int, int] = {}

    async def forget(self) -> None:
        """The client has gone: unmap everything. HostError if that failed."""
        self._set_unreachable({})
        await self._host.dma_unmap_all()

    async def map(self, message: Message) -> bytes:
        """A DMA_MAP without fd, with an odd one, or one that C could not make."""
        fd = message.fds[0] if message.fds else -1
        wanted = dma.parse_dma_map(message.payload, fd)
        memory_fd = fd >= 0 and stat.S_ISREG(os.fstat(fd).st_mode)
        if fd < 0 and self._host.dma_by_messages:
            await self._make(wanted)
            if wanted.prot & uapi.DMA_FLAG_WRITE:
                self._tell_once(
                    "messages", f"{_where(wanted)} came without a file descriptor: {_BY_MESSAGES}{dma.CURE}"
                )
            return b""
        config = self._host.read_block(RegionIndex.CONFIG, 0, uapi.PCI_CFG_SPACE_SIZE)
        bars = dma.bar_placements(self._name, config, self._host.regions)
        decision = dma.decide_map(wanted, bars, memory_fd=memory_fd)
        if decision.text:
            self._tell_once(decision.kind.value, decision.text)
        if decision.into_iommu:
            await self._make(wanted)
        elif decision.kind is MapKind.UNREACHABLE:
            self._set_unreachable({**self.unreachable, wanted.iova: wanted.size})
        return b""

    async def _make(self, wanted: DmaMap) -> None:
        try:
            await self._host.dma_map(wanted)
        except HostError as error:
            maps = self._host.statistics().dma_maps
            self._tell_once(f"errno {error.errno}", dma.explain_map_failure(wanted, error.errno, maps))
            raise

    async def unmap(self, message: Message) -> bytes:
        """A DMA_UNMAP while unmaps come up: something is unreachable, or a log must give its bits first."""
        wanted = dma.parse_dma_unmap(message.payload, uapi.MAX_DATA_XFER_SIZE)
        if wanted.page_size:
            raise ClientError("DMA_UNMAP with a dirty bitmap: ask by DMA_LOGGING_REPORT before the unmap")
        if wanted.everything:
            await self._host.dma_unmap_all()
            self._set_unreachable({})
        else:
            await self._host.dma_unmap(wanted.iova, wanted.size)
            end = wanted.iova + wanted.size
            left = {at: n for at, n in self.unreachable.items() if at < wanted.iova or at + n > end}
            self._set_unreachable(left)
        return message.payload[: uapi.DMA_UNMAP.size]

    def _set_unreachable(self, unreachable: dict[int, int]) -> None:
        self.unreachable = unreachable
        self._context.unmaps_to_python(bool(unreachable))  # to see when it goes

    def _tell_once(self, kind: str, text: str) -> None:
        log.log(logging.DEBUG if kind in self._told else logging.WARNING, "%s", text)
        self._told.add(kind)


_BY_MESSAGES = "each DMA to it is a message to the client, which is slow; "


def _where(wanted: DmaMap) -> str:
    return f"guest memory at {wanted.iova:#x}+{wanted.size:#x}"
