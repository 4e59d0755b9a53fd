"""A VMM that moves memory as the device's log tells: one full pass while the device runs, then only what was written.

What the CPU has written it knows by itself, as KVM tells a VMM. Nothing else is ever copied, so a page that the log
keeps to itself is missing on the other side, and is found. Knows no device.
"""

from collections.abc import Callable, Collection

from vfu_server.testing import Guest, GuestMemory, MigrationRecord, VmmPart, migrate
from vfu_server.testing.client import dirty_pages
from vfu_server.uapi import PAGE_SIZE, PCI_COMMAND

ROUNDS = 3
"""Reports while the device runs."""


class LoggedMemory(GuestMemory):
    """Guest RAM that takes down which pages the CPU writes."""

    def __init__(self, name: str = "guest-memory") -> None:
        super().__init__(name)
        self.by_cpu: set[int] = set()

    def write(self, iova: int, data: bytes) -> None:
        super().write(iova, data)
        self.by_cpu |= set(range(iova // PAGE_SIZE * PAGE_SIZE, iova + len(data), PAGE_SIZE))

    def pages(self) -> set[int]:
        """All of them, by IOVA."""
        return {page for block in self.blocks for page in range(block.iova, block.end, PAGE_SIZE)}


class ByLog:
    """The VMM's part of one migration. `load`: give the device work; called wherever it runs.

    `lose`: pages that are struck from each report, as a log would do that does not see them.
    """

    def __init__(self, here: Guest, there: Guest, load: Callable[[], None], lose: Collection[int] = ()) -> None:
        self.here, self.there = here, there
        self.load = load
        self.lose = lose
        self.told: list[set[int]] = []
        """The pages of each report."""
        self.differing: set[int] = set()
        """Where both memories are not alike when the state has arrived: what the log has not told."""
        self._from, self._to = here.memory, there.memory
        assert isinstance(self._from, LoggedMemory)
        assert isinstance(self._to, LoggedMemory)

    def run(self) -> MigrationRecord:
        """Move device and memory, with work at each step at which the source may still run."""
        part = VmmPart(self._begun, self._stopped, self._arrange)
        return migrate(self.here.client, self.there.client, vmm=part, tell=self._at)

    def _at(self, progress) -> None:
        if progress.step in ("source PRE_COPY", "pre-copy data", "source STOP_COPY"):
            self.load()

    def _begun(self) -> int:
        self.here.client.dma_logging_start([(block.iova, block.size) for block in self._from.blocks])
        self._from.by_cpu.clear()
        copied = self._copy(self._from.pages())
        for _ in range(ROUNDS):
            self.load()
            copied += self._copy_told()
        return copied

    def _stopped(self) -> int:
        self._command = self.here.config.read(PCI_COMMAND, 2)
        copied = self._copy_told()
        self.here.client.dma_logging_stop()
        return copied

    def _arrange(self) -> None:
        self.differing = {
            page for page in self._from.pages() if self._page(self._from, page) != self._page(self._to, page)
        }
        self._to.by_cpu.clear()
        self.there.config.write(PCI_COMMAND, 2, self._command)
        assert self.here.interrupts is not None
        self.there.arm_interrupts(self.here.interrupts.index, len(self.here.interrupts.fds))
        self.there.bars, self.there.addresses = self.here.bars, dict(self.here.addresses)

    def _copy_told(self) -> int:
        told: set[int] = set()
        for block in self._from.blocks:
            told |= set(dirty_pages(self.here.client.dma_logging_report(block.iova, block.size), block.iova))
        self.told.append(told)
        written = told.difference(self.lose) | self._from.by_cpu
        self._from.by_cpu = set()
        return self._copy(written)

    def _copy(self, pages: Collection[int]) -> int:
        for page in pages:
            self._to.write(page, self._page(self._from, page))
        return len(pages) * PAGE_SIZE

    @staticmethod
    def _page(memory: GuestMemory, page: int) -> bytes:
        return memory.read(page, PAGE_SIZE)
