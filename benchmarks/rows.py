"""The rows of the result: what was measured, against what, what was aimed at, and whether it holds.

It measures nothing.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for `ratio`, or for `ours` itself where there is no peer. `at_most` False: at least."""

    limit: float
    at_most: bool = True
    of_ratio: bool = True

    def __str__(self) -> str:
        return f"{'' if self.of_ratio else 'ours '}{'at most' if self.at_most else 'at least'} {self.limit:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` is inside the limit."""
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True, slots=True)
class Row:
    """One line. None: not measured (`reason` says why), or there is nothing to compare with.

    `ratio` is the median of the ratios of the rounds, each of ours and the peer one right after the other; `ours` and
    `peer` are medians of their own, so that their quotient may differ a little.
    """

    name: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    goal: str = ""
    holds: bool | None = None
    reason: str = ""


def compared(name: str, unit: str, ours: list[float], peer: list[float], goal: Goal, reason: str = "") -> Row:
    """A row from the rounds' values, which belong together by place."""
    ratio = median(mine / theirs for mine, theirs in zip(ours, peer, strict=True))
    return Row(name, unit, median(ours), median(peer), ratio, str(goal), goal.holds(ratio), reason)


def absolute(name: str, unit: str, ours: float, goal: Goal | None = None, reason: str = "") -> Row:
    """A row without a peer."""
    holds = goal.holds(ours) if goal else None
    return Row(name, unit, ours, goal=str(goal or ""), holds=holds, reason=reason)


def missing(name: str, unit: str, goal: Goal | None, reason: str) -> Row:
    """A row that this machine or version cannot measure."""
    return Row(name, unit, goal=str(goal or ""), reason=reason)


def write_json(rows: Iterable[Row], path: Path) -> None:
    """The rows as a list of objects."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([_plain(row) for row in rows], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(row: Row) -> dict[str, Any]:
    return {key: _rounded(value) if isinstance(value, float) else value for key, value in asdict(row).items()}


def _rounded(value: float) -> float:
    """Four digits: more are noise."""
    return round(value, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 0.0


def show(rows: Iterable[Row], console: Console, caption: str) -> None:
    """The rows as a table."""
    table = Table(caption=caption, caption_justify="left")
    for head in ("what", "unit", "ours", "peer", "ratio", "goal", "holds"):
        table.add_column(head, justify="right" if head in ("ours", "peer", "ratio") else "left")
    notes = []
    for row in rows:
        if row.reason:
            notes.append(row.reason)
        mark = f" [{len(notes)}]" if row.reason else ""
        numbers = (f"{_rounded(n):g}" if n is not None else "-" for n in (row.ours, row.peer, row.ratio))
        table.add_row(f"{row.name}{mark}".replace("[", "\\["), row.unit, *numbers, row.goal, _verdict(row))
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"  [{number}] {note}", markup=False, highlight=False, soft_wrap=True)


def _verdict(row: Row) -> str:
    if row.holds is None:
        return "reported" if row.ours is not None else "not measured"
    return "[green]yes[/]" if row.holds else "[red]no[/]"
