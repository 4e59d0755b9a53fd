"""Rounds: ours and the peer's turn by turn, so that what happens on the machine meanwhile hits both."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def interleaved(rounds: int, ours: Callable[[], T], peer: Callable[[], T]) -> tuple[list[T], list[T]]:
    """What each gave in each round; who begins changes."""
    mine: list[T] = []
    theirs: list[T] = []
    for number in range(rounds):
        for measure, results in ((ours, mine), (peer, theirs))[:: -1 if number % 2 else 1]:
            results.append(measure())
    return mine, theirs


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all lie."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]
