"""A migration at whose every step something fails: the guest's device runs in one place with all of its state.

`python -m pytest tests/matrix -m ""` runs all cases; without that every sixth. A case by its name: `-k`.
"""

from collections import Counter

from tests.matrix.cases import DATA, FLOWS, kinds
from tests.matrix.collected import found
from tests.matrix.judge import try_case
from vfu_server.testing.failing import Call


def test_a_step_of_a_migration_fails(world, migration_case):
    case, watched = migration_case
    try_case(world, case, watched)


def test_the_matrix_is_whole():
    """It is made from what was watched, so it must have watched what there is."""
    migrations, single = found()
    assert len(migrations) + len(single) >= 500
    assert len({str(case) for case, _ in migrations}) == len(migrations)
    methods = Counter(case.place.split()[0] for case, _ in migrations)
    for method in ("stop", "start", "save_begin", "save", "send", "save_end", "estimate", "precopy_info", "identity"):
        assert methods[method], method
    for method in ("check_identity", "load_begin", "knows", "load", "load_done", "shadow_write", "reset"):
        assert methods[method], method
    struck = {(case.side, case.kind) for case, _ in migrations}
    for kind in {*kinds(Call("send", 1)), *kinds(Call("stop", 1)), "client dies its answer unread"}:
        assert {("source", kind), ("destination", kind)} & struck, kind
    assert {kind for side, kind in struck if side == "destination"} >= set(DATA)
    for flow in FLOWS:
        pages = {case.place for case, _ in migrations if case.flow is flow and case.place.startswith("send ")}
        assert len(pages) >= flow.pages, f"{flow.name}: every section is a place"
