"""`python -m benchmarks`: measures, prints a table, writes build/bench.json. Ends with 1 if something could not run.

A goal that is missed is a result like any other: the exit code does not tell it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from benchmarks import accesses, dirty, machine, native_build, process, rows, state, vendors
from benchmarks.machine import Machine
from benchmarks.processes import TREE, BenchmarkError, folder
from benchmarks.rows import Row

RESULT = TREE / "build" / "bench.json"
WIDTH = 140
"""Columns where there is no terminal."""
Suite = Callable[[Machine, int, Path], Iterator[Row]]
SUITES: dict[str, Suite] = {
    "accesses": accesses.measure,
    "process": process.measure,
    "state": state.measure,
    "dirty": dirty.measure,
    "vendors": vendors.measure,
}


def run(names: list[str], rounds: int, console: Console) -> tuple[list[Row], list[str]]:
    """The rows, and what went wrong."""
    here = machine.look()
    native_build.build_all()
    found: list[Row] = []
    failures: list[str] = []
    for name in names:
        with console.status(f"measuring: {name}"), folder() as where:
            try:
                found += SUITES[name](here, rounds, where)
            except BenchmarkError as error:
                failures.append(f"{name}: {error}")
    rows.show(found, console, str(here))
    return found, failures


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement (default: 5)")
    parser.add_argument("--only", choices=sorted(SUITES), action="append", help="only these; repeat it for several")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    found, failures = run(arguments.only or list(SUITES), max(arguments.rounds, 1), console)
    rows.write_json(found, RESULT)
    console.print(f"written to {RESULT.relative_to(TREE)}")
    for failure in failures:
        console.print(f"error: {failure}", style="red", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
