"""A function under load moves many times, with pre-copy, and its guest's memory goes by the firmware's log alone.

Memory goes to the other side once whole while the function runs, and from then on only what the log has told and what
the CPU itself has written; the memory of each destination begins as noise, and is compared whole with the source's
once both stand still. So a page that the log keeps to itself is found, and so is each frame that is lost, comes twice
or is not what was sent (`plugins.mlx5.models.traffic`).
"""

import random
from contextlib import ExitStack
from statistics import median

import pytest

from plugins.mlx5.models.traffic import Traffic
from tests.plugins.by_log import ByLog, LoggedMemory
from tests.plugins.mlx5.served import MB, GuestPort, Served, two

MEMORY = 2 * MB
FEW, MANY = 3, 100
FRAMES = 12
"""Posted at each step at which the source may still run, on each pair; the device makes others by itself."""
PAIRS, GENERATING = (0, 1, 3), 3
AT_REST = ("source STOP_COPY", "memory", "stop-copy data", "arrange", "destination RUNNING")
"""What the guest waits for."""


class Machines:
    """A guest under load, which moves between `sides`, each time to a machine that was just made."""

    def __init__(self, stack: ExitStack, sides: tuple[Served, Served]) -> None:
        self._stack = stack
        self._sides = sides
        self.moves = 0
        self.here = self._machine()
        self.here.start()
        self.here.enable_msix(8)
        self.traffic = Traffic(GuestPort(self.here), pairs=PAIRS)
        self.traffic.start()
        self.traffic.generate(GENERATING, 500, 300)

    def _machine(self):
        memory = self._stack.enter_context(LoggedMemory.of(MEMORY))
        memory.write(0, random.Random(self.moves).randbytes(MEMORY))
        return self._stack.enter_context(self._sides[self.moves % 2].guest(memory))

    def work(self) -> None:
        """Look at what has come, and leave frames under way."""
        self.traffic.poll()
        self.traffic.post(FRAMES)

    def move(self, **how) -> tuple[ByLog, object]:
        """Move once, and go on there if all of memory is right."""
        self.moves += 1
        there = self._machine()
        there.plug_in()
        there.machine_reset()
        vmm = ByLog(self.here, there, self.work, **how)
        record = vmm.run()
        if not vmm.differing:
            self.here.close()
            self.here.memory.close()
            self.traffic.moved(GuestPort(there))
            self.here = there
        return vmm, record


@pytest.mark.deadline(900)
@pytest.mark.parametrize("moves", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_nothing_is_lost_over_many_migrations(tmp_path, record_property, moves):
    records = []
    with two(tmp_path, "--image-size", "1M") as sides:
        with ExitStack() as stack:
            machines = Machines(stack, sides)
            for _ in range(moves):
                machines.work()
                vmm, record = machines.move()
                records.append(record)
                assert vmm.differing == set()
                everywhere = machines.here.memory.pages()
                assert all(told < everywhere for told in vmm.told)
                assert set().union(*vmm.told), "nothing was written"
                assert record.pre_copy_bytes > 1 * MB, "the first image comes while it runs"
            machines.traffic.finish()
            assert sum(lane.sent for lane in machines.traffic.lanes) >= moves * FRAMES
            machines.traffic.run(20)
        for side in sides:
            assert side.server.end()[0] == 0, side.server.log
            assert "Traceback" not in side.server.log
            assert side.registers["violations"] == 0
    shown = ", ".join(f"{name} {median(r.seconds(name) for r in records) * 1e3:.1f}" for name in AT_REST)
    line = f"downtime {median(r.downtime for r in records) * 1e3:.1f} ms in {moves} migrations, by step: {shown}"
    record_property("downtime", line)
    print(line)


@pytest.mark.deadline(300)
@pytest.mark.parametrize("ring", ["completions", "buffers"])
def test_a_page_that_the_log_keeps_to_itself_is_found(tmp_path, ring):
    """The ring of completions is written for each frame, the buffers of received ones now and then."""
    with two(tmp_path) as sides, ExitStack() as stack:
        machines = Machines(stack, sides)
        machines.work()
        lane = machines.traffic.lanes[-1]
        first, count = {"completions": (0x2000, 1), "buffers": (0x30000, 32)}[ring]
        lost = {lane.base + first + 0x1000 * n for n in range(count)}
        vmm, _ = machines.move(lose=lost)
        assert vmm.differing
        assert vmm.differing <= lost
        assert vmm.differing <= set().union(*vmm.told)
