"""All cases, found once by watching a run of each flow."""

from functools import cache

from tests.matrix import arcs, cases
from tests.matrix.world import World


@cache
def found() -> tuple[list[tuple[cases.Case, cases.Watched]], list[arcs.ArcCase]]:
    """The cases of migrations, with what was watched, and the cases of single arcs."""
    world = World()
    try:
        seen = [(flow, cases.watch(world, flow)) for flow in cases.FLOWS]
        migrations = [(case, watched) for flow, watched in seen for case in cases.cases(flow, watched)]
        return migrations, list(arcs.cases(world))
    finally:
        world.close()
