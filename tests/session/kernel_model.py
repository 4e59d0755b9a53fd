"""The kernel's migration states as a person reads them in its header, and the way from one to another by search.

Written from the rules (linux/vfio.h, enum vfio_device_mig_state), not from the table that the server has.
"""

from collections import deque

from vfu_server.uapi import MIGRATION_P2P, MIGRATION_PRE_COPY, MigState

S, R, SC, RES = MigState.STOP, MigState.RUNNING, MigState.STOP_COPY, MigState.RESUMING
RP, P, PP = MigState.RUNNING_P2P, MigState.PRE_COPY, MigState.PRE_COPY_P2P

SAVING = {SC, P, PP}
STOPS = {(R, S), (R, RP), (RP, S), (P, PP), (P, SC), (PP, SC)}
"""Arcs on which the device is told to stop, wholly or in part."""
STARTS = {(S, R), (S, RP), (RP, R), (PP, P)}

BASE = {(S, SC), (SC, S), (S, RES), (RES, S)}
WITHOUT_P2P = {(R, S), (S, R)}
WITH_P2P = {(R, RP), (RP, R), (RP, S), (S, RP)}
PRE_COPY = {(R, P), (P, R)}
PRE_COPY_WITHOUT_P2P = {(P, SC)}
PRE_COPY_WITH_P2P = {(P, PP), (PP, P), (RP, PP), (PP, RP), (PP, SC)}


def arcs(flags: int) -> set[tuple[MigState, MigState]]:
    """What a driver with these flags is led along, one at a time."""
    p2p, pre_copy = flags & MIGRATION_P2P, flags & MIGRATION_PRE_COPY
    found = BASE | (WITH_P2P if p2p else WITHOUT_P2P)
    if pre_copy:
        found |= PRE_COPY | (PRE_COPY_WITH_P2P if p2p else PRE_COPY_WITHOUT_P2P)
    return found


def way(flags: int, source: MigState, target: int) -> list[MigState] | None:
    """The states from `source` (left out) to `target`; None: the kernel answers EINVAL and walks nothing.

    The shortest way on which no saving state lies in the middle, but for PRE_COPY -> PRE_COPY_P2P -> STOP_COPY, which
    is one session. A save that has ended cannot go back to its beginning.
    """
    steps = arcs(flags)
    if source is MigState.ERROR or target not in {state for arc in steps for state in arc}:
        return None
    if source is SC and target in (P, PP):
        return None
    queue: deque[list[MigState]] = deque([[source]])
    seen = {source}
    while queue:
        walked = queue.popleft()
        if walked[-1] == target:
            return walked[1:]
        here = walked[-1]
        if here in SAVING and here is not source and (source, here, target) != (P, PP, SC):
            continue
        for _, there in sorted(arc for arc in steps if arc[0] is here):
            if there not in seen:
                seen.add(there)
                queue.append([*walked, there])
    return None
