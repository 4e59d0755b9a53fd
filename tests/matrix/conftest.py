"""The loop that all cases share, and the cases: found by watching one run of each flow when tests are collected.

Every `EVERY`th case belongs to the usual run; the others are marked slow.
"""

from collections.abc import Iterator, Sequence

import pytest

from tests.matrix.collected import found
from tests.matrix.world import World

EVERY = 6


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    migrations, single = found()
    if "migration_case" in metafunc.fixturenames:
        metafunc.parametrize("migration_case", sampled(migrations, [str(case) for case, _ in migrations]))
    if "arc_case" in metafunc.fixturenames:
        metafunc.parametrize("arc_case", sampled(single, [str(case) for case in single]))


def sampled(values: Sequence[object], names: Sequence[str]) -> list[object]:
    return [
        pytest.param(value, id=name, marks=[pytest.mark.slow] if index % EVERY else [])
        for index, (value, name) in enumerate(zip(values, names, strict=True))
    ]


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()
