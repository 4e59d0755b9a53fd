"""How far a migration is, for whoever watches: a bar on a terminal, and a table of steps at the end.

It must not act. Slow libraries are imported when a terminal is there to show anything on.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vfu_server.testing.migrate import MigrationRecord, Progress, Step


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[Progress], None]]:
    """What takes the progress: shown on standard error while the `with` lasts if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(now: Progress) -> None:
            total = None if now.left is None else now.state_bytes + now.left
            rounds = f" (round {now.rounds})" if now.rounds and now.step == "pre-copy data" else ""
            bars.update(task, description=now.step + rounds, completed=now.state_bytes, total=total)

        yield show


def steps_table(steps: Sequence[Step]) -> Iterator[str]:
    """A line for each step that took any time to speak of."""
    for step in steps:
        yield f"{step.seconds * 1e3:10.1f} ms  {step.name}"


def moved(record: MigrationRecord) -> Iterator[str]:
    """What a migration did: steps, bytes, rounds, and the downtime with the steps that it is made of."""
    yield from steps_table(record.steps)
    names = [step.name for step in record.steps]
    after = record.steps[names.index("source STOP_COPY") : names.index("destination RUNNING") + 1]
    early = f"{record.pre_copy_bytes} bytes early in {record.rounds} rounds, " if record.rounds else ""
    yield f"state: {early}{record.stop_copy_bytes} bytes after the stop"
    largest = max(after, key=lambda step: step.seconds)
    share = f"most of it {largest.name}, {largest.seconds * 1e3:.1f} ms"
    yield f"downtime: {record.downtime * 1e3:.1f} ms, {share}"
