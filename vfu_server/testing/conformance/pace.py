"""How long tasks hold the event loop: measured by an instrument of the loop, for a report and not for a verdict.

CPU time of the loop's thread, so that a busy machine does not count against the plugin.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from vfu_server.testing.conformance.records import Warned, check

if TYPE_CHECKING:
    from vfu_server.testing.conformance.bench import Bench

LIMIT = 0.005
"""Seconds of computing after which other devices' clients feel it."""
KEPT = 5


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a task: seconds of CPU and of wall time, the task, and what the plugin was called for last."""

    cpu: float
    wall: float
    task: str
    doing: str


class Pace(trio.abc.Instrument):
    """Keeps the longest steps."""

    def __init__(self, doing: Callable[[], str]) -> None:
        self._doing = doing
        self._begun = (0.0, 0.0)
        self.steps = 0
        self.longest: list[Step] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._begun = time.thread_time(), time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        cpu, wall = time.thread_time() - self._begun[0], time.perf_counter() - self._begun[1]
        doing = self._doing()
        if not doing:
            return  # a plugin is imported and asked whether it takes the device: nobody waits yet
        self.steps += 1
        if len(self.longest) == KEPT and cpu <= self.longest[-1].cpu:
            return
        self.longest = sorted([*self.longest, Step(cpu, wall, task.name, doing)], key=lambda s: -s.cpu)[:KEPT]


@check("pace", "no coroutine computes for more than 5 ms at a stretch", migrates=False)
def pace(bench: "Bench") -> str:
    """Judges what all other checks have made the plugin do."""
    longest = bench.pace.longest
    slow = [step for step in longest if step.cpu > LIMIT]
    if slow:
        told = "; ".join(f"{s.cpu * 1e3:.1f} ms in {s.task} (last calls: {s.doing})" for s in slow)
        raise Warned(f"the event loop was held: {told}")
    if not longest:
        return "no step was seen"
    worst = longest[0]
    return f"{bench.pace.steps} steps, the longest {worst.cpu * 1e3:.2f} ms of CPU ({worst.wall * 1e3:.2f} ms in all)"
