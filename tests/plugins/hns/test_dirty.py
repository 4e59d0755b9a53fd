"""Dirty pages of a VF whose queues are never empty: what a VMM is told is all that it needs.

The function has no log of its DMA. On a host the IOMMU keeps one, where it can; else the client is told that all of
the memory that the device may write is written (`--dirty-tracking all`), or that there is no log at all. The memory of
each destination begins as noise, so what was not copied shows.
"""

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from plugins.hns.models.traffic import Traffic
from tests.plugins.by_log import ByLog, LoggedMemory
from tests.plugins.hns.behind_vfio import KernelSide
from tests.plugins.hns.served import SECONDS, Served
from vfu_server.testing import Client, Guest, ReplyError
from vfu_server.uapi import FEATURE_SET, PAGE_SIZE, Feature, MigState

MEMORY = 1 << 20
START = 0x10000
FEW, MANY = 3, 50
QUEUES, DEPTH, SIZE = 3, 32, 512
ENTRIES = 8
"""That must have ended each time work is given: some are written behind each report."""

Connect = Callable[[], Client]


@contextmanager
def iommu(folder) -> Iterator[list[Connect]]:
    """Two VFs under a kernel whose IOMMU keeps dirty bits."""
    with ExitStack() as stack:
        sides = []
        for name in ("a", "b"):
            sides.append(KernelSide(folder / name))
            stack.callback(sides[-1].close)
        yield [side.client for side in sides]


@contextmanager
def everything(folder) -> Iterator[list[Connect]]:
    """Two VFs of which nobody knows what they write."""
    model, options = ("zip", "--no-doorbell-isolation"), ("--dirty-tracking", "all")
    with Served(folder / "a", *model, options=options) as one, Served(folder / "b", *model, options=options) as other:
        yield [lambda each=each: Client.connect(each.path, timeout=SECONDS) for each in (one, other)]


SOURCES = {"iommu": iommu, "all": everything}


class Machines:
    """A guest under load, and where it may go: `sides` in turn, each time to a machine that was just made."""

    def __init__(self, stack: ExitStack, sides: list[Connect]) -> None:
        self._stack = stack
        self._sides = sides
        self.here = self._machine(0).start()
        self.traffic = Traffic(self.here, queues=QUEUES, start=START, depth=DEPTH, size=SIZE, timeout=SECONDS)
        assert self.traffic.end <= MEMORY
        self.moves = 0

    def _machine(self, number: int) -> Guest:
        memory = self._stack.enter_context(LoggedMemory.of(MEMORY))
        memory.write(0, random.Random(number).randbytes(MEMORY))
        return self._stack.enter_context(Guest(self._sides[number % 2](), memory))

    def work(self) -> None:
        self.traffic.run_entries(ENTRIES)
        self.traffic.submit()

    def move(self, **how) -> ByLog:
        """Move once, and go on there if all of memory is right."""
        self.moves += 1
        there = self._machine(self.moves)
        there.plug_in()
        there.machine_reset()
        vmm = ByLog(self.here, there, self.work, **how)
        vmm.run()
        if not vmm.differing:
            self.here.close()
            self.traffic.move(there, there.interrupts)
            self.here = there
        return vmm


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("moves", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.deadline(900)])])
def test_memory_is_whole_after_each_of_many_migrations(tmp_path, source, moves):
    with SOURCES[source](tmp_path) as sides, ExitStack() as stack:
        machines = Machines(stack, sides)
        for _ in range(moves):
            machines.work()
            vmm = machines.move()
            assert vmm.differing == set()
            everywhere = machines.here.memory.pages()
            for told in vmm.told:
                assert told == everywhere if source == "all" else told < everywhere
            assert vmm.told[-1], "the last entries and the queues' contexts come behind the last report while it runs"
        count = machines.traffic.finish()
        assert count.submitted == count.completed >= moves * ENTRIES


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("what", ["eq", "sqc_table"])
def test_a_page_that_the_log_keeps_to_itself_is_found(tmp_path, source, what):
    """The EQ is written while the function runs, the contexts' table by the write-back when it is stopped."""
    with SOURCES[source](tmp_path) as sides, ExitStack() as stack:
        machines = Machines(stack, sides)
        machines.work()
        lost = {getattr(machines.traffic.driver.layout, what)}
        vmm = machines.move(lose=lost)
        assert vmm.differing == lost
        assert lost <= set().union(*vmm.told)


def test_without_a_log_there_is_none_for_the_client_either(folder):
    """So that no VMM takes memory for copied that is not."""
    with Served(folder / "a") as server, server.connect() as guest:
        guest.start()
        assert not guest.client.feature_probe(Feature.DMA_LOGGING_START, FEATURE_SET)
        with pytest.raises(ReplyError) as refused:
            guest.client.dma_logging_start([(0, 16 * PAGE_SIZE)])
        assert refused.value.errno == errno.ENOTTY
        assert guest.client.mig_state() is MigState.RUNNING
