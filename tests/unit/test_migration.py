"""The state machine against the kernel's step tables, typed in, and against a search over the rules behind them."""

import errno
from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_server.device import Capabilities
from vfu_server.errors import PluginError, StateError
from vfu_server.migration import (
    FLAG_SETS,
    Arc,
    DataSession,
    Step,
    arcs,
    data_session,
    migration_flags,
    next_step,
    offers,
    path,
    states,
    steps,
    undo,
)
from vfu_server.policy import STATE_CLASS, StateClass
from vfu_server.uapi import MIGRATION_P2P, MIGRATION_PRE_COPY, MIGRATION_STOP_COPY, MigState

SHORT = {
    "S": MigState.STOP,
    "R": MigState.RUNNING,
    "Rp": MigState.RUNNING_P2P,
    "SC": MigState.STOP_COPY,
    "RES": MigState.RESUMING,
    "P": MigState.PRE_COPY,
    "Pp": MigState.PRE_COPY_P2P,
}

ALL = MIGRATION_STOP_COPY | MIGRATION_P2P | MIGRATION_PRE_COPY

# Walked with the kernel's own table (equal in Linux 6.12 and 7.2; 6.1 has the same cells for flags 1 and 3). x: EINVAL.
KERNEL_TABLES = {
    ALL: """
        from S        R         Rp    SC      RES         P         Pp
        S    -        Rp,R      Rp    SC      RES         Rp,R,P    Rp,Pp
        R    Rp,S     -         Rp    Rp,S,SC Rp,S,RES    P         Rp,Pp
        Rp   S        R         -     S,SC    S,RES       R,P       Pp
        SC   S        S,Rp,R    S,Rp  -       S,RES       x         x
        RES  S        S,Rp,R    S,Rp  S,SC    -           S,Rp,R,P  S,Rp,Pp
        P    R,Rp,S   R         R,Rp  Pp,SC   R,Rp,S,RES  -         Pp
        Pp   Rp,S     Rp,R      Rp    SC      Rp,S,RES    P         -
    """,
    MIGRATION_STOP_COPY | MIGRATION_PRE_COPY: """
        from S    R    SC    RES      P
        S    -    R    SC    RES      R,P
        R    S    -    S,SC  S,RES    P
        SC   S    S,R  -     S,RES    x
        RES  S    S,R  S,SC  -        S,R,P
        P    R,S  R    SC    R,S,RES  -
    """,
    MIGRATION_STOP_COPY | MIGRATION_P2P: """
        from S     R       Rp    SC       RES
        S    -     Rp,R    Rp    SC       RES
        R    Rp,S  -       Rp    Rp,S,SC  Rp,S,RES
        Rp   S     R       -     S,SC     S,RES
        SC   S     S,Rp,R  S,Rp  -        S,RES
        RES  S     S,Rp,R  S,Rp  S,SC     -
    """,
    MIGRATION_STOP_COPY: """
        from S  R    SC    RES
        S    -  R    SC    RES
        R    S  -    S,SC  S,RES
        SC   S  S,R  -     S,RES
        RES  S  S,R  S,SC  -
    """,
}

# The single arcs of a driver, and where P2P replaces them.
BASE_ARCS = ["S-SC", "SC-S", "S-RES", "RES-S"]
PLAIN_ARCS = ["R-S", "S-R"]
P2P_ARCS = ["R-Rp", "Rp-R", "Rp-S", "S-Rp"]
PRE_COPY_ARCS = ["R-P", "P-R"]
BOTH_ARCS = ["P-Pp", "Pp-P", "Rp-Pp", "Pp-Rp", "Pp-SC"]


def arcs_by_rule(flags):
    names = list(BASE_ARCS)
    names += P2P_ARCS if flags & MIGRATION_P2P else PLAIN_ARCS
    if flags & MIGRATION_PRE_COPY:
        names += PRE_COPY_ARCS
        names += BOTH_ARCS if flags & MIGRATION_P2P else ["P-SC"]
    return {Arc(*(SHORT[end] for end in name.split("-"))) for name in names}


def kernel_paths(flags):
    header, *rows = (line.split() for line in KERNEL_TABLES[flags].strip().splitlines())
    for row in rows:
        for target, cell in zip(header[1:], row[1:], strict=True):
            walked = None if cell == "x" else () if cell == "-" else tuple(SHORT[name] for name in cell.split(","))
            yield SHORT[row[0]], SHORT[target], walked


SAVING = {MigState.PRE_COPY, MigState.PRE_COPY_P2P, MigState.STOP_COPY}


def shortest_by_rule(flags, source, target):
    """The shortest walks whose middle has no saving state but for P -> Pp -> SC, by breadth-first search."""
    ways = arcs_by_rule(flags)
    found, queue = [], deque([(source,)])
    while queue:
        walk = queue.popleft()
        if found and len(walk) > len(found[0]):
            break
        if walk[-1] is target:
            found.append(walk)
            continue
        for arc in ways:
            longer = (*walk, arc.target)
            if arc.source is not walk[-1] or arc.target in walk:
                continue
            one_session = longer == (MigState.PRE_COPY, MigState.PRE_COPY_P2P, MigState.STOP_COPY)[: len(longer)]
            # in the middle now, since the walk goes on behind it
            if walk[-1] in SAVING and len(walk) > 1 and not one_session:
                continue
            queue.append(longer)
    return found


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_paths_are_the_kernels(flags):
    seen = 0
    for source, target, walked in kernel_paths(flags):
        seen += 1
        if walked is None:
            with pytest.raises(StateError) as refused:
                path(flags, source, target)
            assert refused.value.errno == errno.EINVAL
        else:
            assert path(flags, source, target) == walked
            assert next_step(flags, source, target) is (walked[0] if walked else source)
    assert seen == len(states(flags)) ** 2


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_paths_are_the_shortest_that_the_rules_allow(flags):
    for source in states(flags):
        for target in states(flags):
            found = shortest_by_rule(flags, source, target)
            assert len(found) == 1, (source, target, found)
            if source is MigState.STOP_COPY and target in SAVING - {source}:
                with pytest.raises(StateError):  # the two that the kernel blocks by name
                    path(flags, source, target)
            else:
                assert (source, *path(flags, source, target)) == found[0]


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_arcs_are_those_of_the_rules(flags):
    assert arcs(flags) == arcs_by_rule(flags)
    for arc in arcs(flags):
        assert steps(arc)


@pytest.mark.parametrize("flags", FLAG_SETS)
@pytest.mark.parametrize("target", [0, 8, 9, 255, 1 << 31, (1 << 32) - 1, -1])
def test_error_and_unknown_numbers_cannot_be_asked_for(flags, target):
    for source in MigState:
        with pytest.raises(StateError) as refused:
            next_step(flags, source, target)
        assert refused.value.errno == errno.EINVAL
        assert not offers(flags, target)


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_a_state_whose_flag_is_missing_is_refused(flags):
    missing = set(MigState) - states(flags) - {MigState.ERROR}
    for source in states(flags):
        for target in missing:
            with pytest.raises(StateError, match="does not offer"):
                path(flags, source, target)
            with pytest.raises(StateError, match="does not offer"):
                path(flags, target, source)
    for target in missing:
        flag = "PRE_COPY" if target in SAVING and not flags & MIGRATION_PRE_COPY else "P2P"
        with pytest.raises(StateError, match=f"{target.name} was asked for, which needs .*{flag}"):
            path(flags, MigState.STOP, target)
    wanted = {
        MIGRATION_P2P: {MigState.RUNNING_P2P, MigState.PRE_COPY_P2P},
        MIGRATION_PRE_COPY: {MigState.PRE_COPY, MigState.PRE_COPY_P2P},
    }
    assert missing == set().union(*(names for flag, names in wanted.items() if not flags & flag))


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_nothing_leads_out_of_error(flags):
    for target in MigState:
        with pytest.raises(StateError) as refused:
            path(flags, MigState.ERROR, target)
        assert refused.value.errno == errno.EINVAL
    with pytest.raises(StateError, match="reset"):
        path(flags, MigState.ERROR, MigState.RUNNING)


@pytest.mark.parametrize("flags", [0, 2, 4, 6, 8, 9, -1])
def test_flags_that_no_device_may_offer(flags):
    with pytest.raises(PluginError):
        next_step(flags, MigState.RUNNING, MigState.STOP)
    with pytest.raises(PluginError):
        states(flags)


def test_flags_of_a_plugins_capabilities():
    assert migration_flags(Capabilities()) == MIGRATION_STOP_COPY
    assert migration_flags(Capabilities(p2p=True)) == MIGRATION_STOP_COPY | MIGRATION_P2P
    assert migration_flags(Capabilities(pre_copy=True)) == MIGRATION_STOP_COPY | MIGRATION_PRE_COPY
    assert migration_flags(Capabilities(p2p=True, pre_copy=True)) == ALL
    assert migration_flags(Capabilities(migratable=False, reason="a test", p2p=True, pre_copy=True)) == 0


RUNS = {StateClass.RUNNING: "full", StateClass.P2P: "p2p", StateClass.STOPPED: "no", StateClass.RESUMING: "no"}


@given(flags=st.sampled_from(FLAG_SETS), wishes=st.lists(st.integers(0, 9), max_size=30))
def test_any_sequence_of_wishes_walks_arcs_only(flags, wishes):
    """Whatever a client asks for: each step is an arc of the rules, sessions open and close in pairs."""
    state, session, running = MigState.RUNNING, DataSession.NONE, "full"
    ways = arcs_by_rule(flags)
    for wish in wishes:
        try:
            walked = path(flags, state, wish)
        except StateError:
            continue
        for source, target in pairwise((state, *walked)):
            arc = Arc(source, target)
            assert arc in ways
            for step in steps(arc):
                session, running = _do(step, arc, session, running)
            assert session is data_session(target)
            assert running == RUNS[STATE_CLASS[target]]
            state = target
        assert state == wish


def _do(step, arc, session, running):
    """A device with a session, as the steps lead it; a step out of order fails."""
    match step:
        case Step.OPEN_SAVE | Step.OPEN_LOAD:
            assert session is DataSession.NONE
            session = DataSession.SAVE if step is Step.OPEN_SAVE else DataSession.LOAD
        case Step.CLOSE_SAVE:
            assert session is DataSession.SAVE
            session = DataSession.NONE
        case Step.FINISH_LOAD:
            assert session is DataSession.LOAD
            assert running == "no"
            session = DataSession.NONE
        case Step.SAVE_PRE_COPY | Step.PAUSE_PRE_COPY:
            assert (session, running) == (DataSession.SAVE, "full")
        case Step.SAVE_STOP_COPY:
            assert (session, running) == (DataSession.SAVE, "no")
        case Step.STOP_P2P:
            assert running == "full"
            running = "p2p"
        case Step.STOP_FULL:
            assert running in ("full", "p2p")
            running = "no"
        case Step.START_P2P:
            assert running == "p2p"
            running = "full"
        case Step.START_FULL:
            assert running == "no"
            running = RUNS[arc.target_class]
        case Step.APPLY_SHADOW:
            assert running == RUNS[arc.target_class] != "no"
        case Step.SWITCH_CLASS:
            pass
        case _:
            raise AssertionError(f"{step} on an arc")
    return session, running


def test_a_device_is_under_the_rules_of_rest_whenever_it_is_not_running():
    for arc in set().union(*(arcs(flags) for flags in FLAG_SETS)):
        order = steps(arc)
        switches = order.count(Step.SWITCH_CLASS)
        assert switches == (arc.source_class is not arc.target_class), arc
        assert Step.SWITCH_BACK not in order
        for stop in (Step.STOP_P2P, Step.STOP_FULL):
            if stop in order:
                assert order.index(Step.SWITCH_CLASS) + 1 == order.index(stop), arc
        for start in (Step.START_P2P, Step.START_FULL):
            if start in order:
                at = order.index(start)
                assert order[at : at + 3] == (start, Step.APPLY_SHADOW, Step.SWITCH_CLASS), arc


def test_data_sessions_open_and_close_where_the_kernel_gives_and_takes_the_fd():
    opening = {str(arc): arc.opens for arc in arcs(ALL) | arcs(5) if arc.opens is not DataSession.NONE}
    assert opening == {
        "RUNNING -> PRE_COPY": DataSession.SAVE,
        "RUNNING_P2P -> PRE_COPY_P2P": DataSession.SAVE,
        "STOP -> STOP_COPY": DataSession.SAVE,
        "STOP -> RESUMING": DataSession.LOAD,
    }
    for arc in arcs(ALL) | arcs(5):
        order = steps(arc)
        assert (Step.OPEN_SAVE in order) == (arc.opens is DataSession.SAVE)
        assert (Step.OPEN_LOAD in order) == (arc.opens is DataSession.LOAD)
        assert (Step.CLOSE_SAVE in order) == (arc.closes is DataSession.SAVE)
        assert (Step.FINISH_LOAD in order) == (arc.closes is DataSession.LOAD)
        assert (Step.SAVE_STOP_COPY in order) == (arc.target is MigState.STOP_COPY)


def test_two_states_without_an_arc_have_no_steps():
    with pytest.raises(StateError, match="no arc leads from RESUMING to RUNNING"):
        steps(Arc(MigState.RESUMING, MigState.RUNNING))


@pytest.mark.parametrize(
    ("source", "target", "failed", "back"),
    [
        ("R", "S", Step.STOP_FULL, (Step.SWITCH_BACK,)),
        ("R", "Rp", Step.STOP_P2P, (Step.SWITCH_BACK,)),
        ("S", "R", Step.START_FULL, ()),
        ("S", "R", Step.APPLY_SHADOW, (Step.STOP_FULL,)),
        ("P", "Pp", Step.STOP_P2P, (Step.SWITCH_BACK, Step.SAVE_PRE_COPY)),
        ("P", "SC", Step.STOP_FULL, (Step.SWITCH_BACK, Step.SAVE_PRE_COPY)),
        ("P", "SC", Step.SAVE_STOP_COPY, (Step.START_FULL, Step.SWITCH_BACK, Step.SAVE_PRE_COPY)),
        ("S", "SC", Step.SAVE_STOP_COPY, (Step.CLOSE_SAVE,)),
        ("S", "RES", Step.OPEN_LOAD, (Step.SWITCH_BACK,)),
        ("RES", "S", Step.FINISH_LOAD, ()),
    ],
)
def test_a_failed_step_is_taken_back_to_the_state_before_the_arc(source, target, failed, back):
    assert undo(Arc(SHORT[source], SHORT[target]), failed) == back


def test_the_numbers_are_the_kernels():
    assert [(state.name, state.value) for state in sorted(MigState)] == [
        ("ERROR", 0),
        ("STOP", 1),
        ("RUNNING", 2),
        ("STOP_COPY", 3),
        ("RESUMING", 4),
        ("RUNNING_P2P", 5),
        ("PRE_COPY", 6),
        ("PRE_COPY_P2P", 7),
    ]
