"""What a restore, a save and a profile's hook work with: the device's door, its registers, its layout, and waiting.

One bench belongs to one device. It must not know what is saved or in which order.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from plugins.generic_dmaq.drain import drain
from plugins.generic_dmaq.layout import Layout
from plugins.generic_dmaq.port import Port
from vfu_server.errors import HostError
from vfu_server.host_device import HostDevice, Scratch

log = logging.getLogger(__name__)

STEP_SECONDS = 1.0
"""How long a step of our own (a transfer, a short computation) may take: ten times what the slowest known one does."""


class Bench:
    """The device as the parts of this plugin see it."""

    def __init__(self, host: HostDevice, layout: Layout) -> None:
        self.host = host
        self.layout = layout
        self.port = Port(host, layout.blocks)

    async def wait_empty(self, seconds: float = STEP_SECONDS, settle: float = 0.0) -> float:
        """Wait until all queues are empty; seconds it took. DeadlineError with what the registers read."""
        return await drain(self.port, self.layout.queues, seconds, settle)

    @asynccontextmanager
    async def scratch(self, size: int) -> AsyncIterator[Scratch | None]:
        """Memory that the device can reach with the address bits it has; None where the door cannot give any.

        HostError for memory that the device would miss: it would hit the guest's instead.
        """
        limit = 1 << self.layout.profile.dma_bits
        async with self.host.scratch(size, limit) as found:
            if found is not None and (len(found.memory) < size or found.iova + size > limit):
                raise HostError(
                    f"{self.host.name}: scratch memory {found.iova:#x}+{len(found.memory):#x} is not what was "
                    f"asked for ({size:#x} bytes below {limit:#x})"
                )
            yield found

    def warn(self, text: str) -> None:
        """Tell the operator of something that is not as good as it should be."""
        log.warning("%s: %s", self.host.name, text)
