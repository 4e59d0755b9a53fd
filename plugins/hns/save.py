"""A function's state, read: the match part at any time, the rest of a function at rest.

It must not know how it travels. Source: hisi_acc_vfio_pci.c, the arcs to PRE_COPY and STOP_COPY.
"""

from plugins.hns import mailbox as mb
from plugins.hns.blob import NOT_READY, READY, Match, State, ring_address
from plugins.hns.drain import is_ready, ring_events
from plugins.hns.mailbox import Mailbox
from plugins.hns.registers import CONTEXT_WORDS
from plugins.hns.vft import Queues
from plugins.hns.window import Window

MASKS = ("aeq_int_mask", "eq_int_mask", "ifc_int_source", "ifc_int_mask", "ifc_int_set", "page_size")


def match_part(device: int, queues: Queues, isolation: int, *, ready: bool = True) -> Match:
    """The match part of VF id `device`. In a pre-copy `ready` is not known yet, and READY is what it says then."""
    return Match(queues.count, device, isolation, queues.first, READY if ready else NOT_READY)


async def read_state(window: Window, mailbox: Mailbox) -> State | None:
    """What is behind the match part; None for a function whose guest has no driver loaded, which has nothing more.

    Pending events are raised again, as the kernel's driver does.
    """
    if not await is_ready(window):
        return None
    masks = window.snapshot(MASKS)
    eqc = tuple(window.read(f"eqc{i}") for i in range(CONTEXT_WORDS))
    aeqc = tuple(window.read(f"aeqc{i}") for i in range(CONTEXT_WORDS))
    sqc = await mailbox.get(mb.SQC_TABLE)
    cqc = await mailbox.get(mb.CQC_TABLE)
    ring_events(window)
    return State(**masks, eqc=eqc, aeqc=aeqc, eqe=ring_address(eqc), aeqe=ring_address(aeqc), sqc=sqc, cqc=cqc)
