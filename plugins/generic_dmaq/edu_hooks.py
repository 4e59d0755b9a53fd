"""What edu's table cannot say: a buffer that only DMA reaches, a command kept by being run, a result with no way in.

Facts from QEMU's hw/misc/edu.c (11.1), tried register by register: a command runs 100 ms; it is dropped while one runs
or without bit 0; the buffer is at 0x40000 in the device's own address space; a count of 0 moves nothing and is good.
"""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import trio

from plugins.generic_dmaq.bench import STEP_SECONDS
from plugins.generic_dmaq.hooks import Hooks
from vfu_server.errors import HostError, RestoreError
from vfu_server.host_device import Scratch
from vfu_server.pci_command import lent_command
from vfu_server.regmap import Register
from vfu_server.uapi import PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER

BUFFER: Final = 0x40000
BUFFER_SIZE: Final = 0x1000
RUN: Final = 1
FROM_BUFFER: Final = 2
WITH_IRQ: Final = 4
IRQ_DMA: Final = 0x100


def _results() -> dict[int, int]:
    """Result to input of the factorial unit. From 34 on every result is 0, also that of a unit that never ran."""
    found, product = {1: 0}, 1
    for n in range(1, 35):
        product = product * n & 0xFFFFFFFF
        found.setdefault(product, n)
    return found


RESULTS: Final = _results()


class EduHooks(Hooks):
    """Saves and restores edu's buffer, command and factorial."""

    memory_size = BUFFER_SIZE
    borrowed = ("dma_source", "dma_destination", "dma_count", "dma_command")

    def problem(self, values: Mapping[str, int]) -> str:
        """Registers hold what a guest can bring about, and the device was at rest."""
        if values["factorial"] not in RESULTS:
            return f"factorial {values['factorial']:#x} is the result of no input"
        if values["dma_command"] & RUN or values["status"] & 0x1:
            return "it was not at rest"
        if values["status"] & ~0x80:
            return f"status {values['status']:#x} has bits that the device does not have"
        return ""

    async def save_memory(self) -> bytes | None:
        """The buffer, fetched by the device's own DMA."""
        async with self._dma_page() as scratch:
            if scratch is None:
                self.bench.warn("no scratch memory for DMA: the 4 KiB buffer is not carried")
                return None
            # The device tells of no failed transfer, so what nobody can guess must have been overwritten.
            unfetched = os.urandom(BUFFER_SIZE)
            scratch.memory[:BUFFER_SIZE] = unfetched
            await self._transfer(BUFFER, scratch.iova, RUN | FROM_BUFFER)
            fetched = bytes(scratch.memory[:BUFFER_SIZE])
            if fetched == unfetched:
                raise HostError(f"{self.bench.host.name}: the buffer was not fetched: the device's DMA did not arrive")
            return fetched

    async def can_restore_memory(self) -> bool:
        """There is scratch memory within the device's reach."""
        async with self.bench.scratch(2 * BUFFER_SIZE) as scratch:
            return scratch is not None

    async def restore_memory(self, memory: bytes) -> bool:
        """Put the buffer in by DMA and read it back, since the device reports no failed transfer."""
        async with self._dma_page() as scratch:
            if scratch is None:
                return False
            back = scratch.memory[BUFFER_SIZE : 2 * BUFFER_SIZE]
            scratch.memory[:BUFFER_SIZE] = memory
            back[:] = bytes(~byte & 0xFF for byte in memory)
            await self._transfer(scratch.iova, BUFFER, RUN)
            await self._transfer(BUFFER, scratch.iova + BUFFER_SIZE, RUN | FROM_BUFFER)
            if back != memory:
                raise RestoreError(f"{self.bench.host.name}: the device's buffer does not hold what was written")
        return True

    async def restore(self, register: Register, value: int, values: Mapping[str, int]) -> None:
        """The last command and the factorial, by effect."""
        if register.name == "dma_command":
            await self._restore_command(value)
        elif register.name == "factorial":
            self.bench.port.write("factorial", RESULTS[value])
            await self.bench.wait_empty()

    @asynccontextmanager
    async def _dma_page(self) -> AsyncIterator[Scratch | None]:
        """Two pages of scratch memory with bus mastering on; given back only once the device is done with them."""
        async with self.bench.scratch(2 * BUFFER_SIZE) as scratch:
            if scratch is None:
                yield None
                return
            with lent_command(self.bench.host, PCI_COMMAND_MASTER):
                try:
                    yield scratch
                finally:
                    with trio.CancelScope(shield=True):
                        await self.bench.wait_empty()

    async def _transfer(self, source: int, destination: int, command: int, count: int = BUFFER_SIZE) -> None:
        """Run one command without an interrupt of our own and wait for its end."""
        port = self.bench.port
        await self.bench.wait_empty()
        port.write("dma_source", source)
        port.write("dma_destination", destination)
        port.write("dma_count", count)
        port.write("dma_command", command)
        await self.bench.wait_empty(STEP_SECONDS)

    async def _restore_command(self, value: int) -> None:
        """Have the register read `value`: it keeps a command's bits but bit 0, so that one is run over no bytes.

        One with the interrupt bit signals at its end. That signal is ours and must not reach the guest: without bus
        mastering a message is lost, INTx is disabled, and its status bit is taken back unless it was set before.
        """
        port = self.bench.port
        await self.bench.wait_empty()
        if port.read("dma_command") == value:
            return
        if not value & WITH_IRQ:
            await self._transfer(BUFFER, BUFFER, value | RUN, count=0)
            return
        pending = port.read("irq_status") & IRQ_DMA
        with lent_command(self.bench.host, PCI_COMMAND_INTX_DISABLE, off=PCI_COMMAND_MASTER):
            await self._transfer(BUFFER, BUFFER, value | RUN, count=0)
            if not pending:
                port.write("irq_ack", IRQ_DMA)
