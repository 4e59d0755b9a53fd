"""Every arc of the state machine, with every call on it failing in every way, and then the way back failing, too."""

import pytest

from tests.matrix.arcs import cases, saved, try_arc
from tests.matrix.collected import found
from vfu_server.migration import FLAG_SETS, arcs


@pytest.fixture(scope="module")
def streams(world):
    """A stream to load for each set of features."""
    return {flags: saved(world, flags) for flags in FLAG_SETS}


def test_a_call_on_an_arc_fails(world, streams, arc_case):
    try_arc(world, arc_case, streams[arc_case.flags])


def test_every_arc_is_there_on_which_a_plugin_is_called(world):
    _, single = found()
    assert {str(case) for case in cases(world)} == {str(case) for case in single}, "the same at every look"
    for flags in FLAG_SETS:
        assert {case.arc for case in single if case.flags == flags} == arcs(flags)
