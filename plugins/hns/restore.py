"""A function's state, written: the check that it fits, the order of the registers, and the comparison afterwards.

It must not know how the state came. Source: hisi_acc_vfio_pci.c, the match check and the arc RESUMING to STOP.
"""

from typing import Final

from plugins.hns import mailbox as mb
from plugins.hns.blob import Match, State
from plugins.hns.mailbox import Mailbox
from plugins.hns.registers import CONTEXT_WORDS
from plugins.hns.vft import Queues
from plugins.hns.window import Window
from vfu_server.errors import RestoreError, StreamMismatchError

KNOWN_WORDS: Final = (0, 1, 2, 6)
"""Of a ring's context: head and tail, address, depth and phase."""


def check_match(match: Match, device: int, queues: Queues, isolation: int) -> None:
    """Raise StreamMismatchError if state with that match part cannot be loaded into VF id `device`, so and so made.

    The number of the first queue may differ: it is the hardware's own, and the guest never sees it.
    """
    if match.device != device:
        raise StreamMismatchError(f"the state is of a device {match.device:#06x}, this one is {device:#06x}")
    if match.queues != queues.count:
        raise StreamMismatchError(f"the state is of {match.queues} queues, this device has {queues.count}")
    if match.isolation != isolation:
        raise StreamMismatchError(
            f"the state was saved with queue isolation {match.isolation:#x}, this device has {isolation:#x}"
        )


async def write_state(window: Window, mailbox: Mailbox, match: Match, state: State) -> None:
    """Write all into a function that was reset, and compare. RestoreError names the register that did not take it."""
    window.write("vf_state", match.state)
    await mailbox.idle()
    values = _registers(match, state)
    for name, value in values.items():
        window.write(name, value)
    await mailbox.set(mb.SQC_TABLE, state.sqc)
    await mailbox.set(mb.CQC_TABLE, state.cqc)
    window.write("ifc_int_source", 1)
    window.write("ifc_int_mask", 0)
    await _compare(window, mailbox, match, state, values)


def _registers(match: Match, state: State) -> dict[str, int]:
    """Values in the order in which they are written."""
    return {
        "aeq_int_mask": state.aeq_int_mask,
        "eq_int_mask": state.eq_int_mask,
        "ifc_int_source": state.ifc_int_source,
        "ifc_int_mask": state.ifc_int_mask,
        "ifc_int_set": state.ifc_int_set,
        "queue_isolation": match.isolation,
        "page_size": state.page_size,
        **{f"eqc{i}": state.eqc[i] for i in range(CONTEXT_WORDS)},
        **{f"aeqc{i}": state.aeqc[i] for i in range(CONTEXT_WORDS)},
    }


async def _compare(window: Window, mailbox: Mailbox, match: Match, state: State, values: dict[str, int]) -> None:
    """What would stop the guest's driver if it were lost, or reach foreign memory. Not compared are context words of
    which nobody tells what they mean: hardware may have them for itself.
    """
    expected = {"vf_state": match.state, "queue_isolation": match.isolation}
    expected |= {name: values[name] for name in ("aeq_int_mask", "eq_int_mask", "page_size")}
    expected |= {f"{ring}{n}": values[f"{ring}{n}"] for ring in ("eqc", "aeqc") for n in KNOWN_WORDS}
    for name, value in expected.items():
        if (found := window.read(name)) != value:
            raise RestoreError(f"{window.name}: {name} reads {found:#x} after {value:#x} was written")
    for command, value in ((mb.SQC_TABLE, state.sqc), (mb.CQC_TABLE, state.cqc)):
        if (found := await mailbox.get(command)) != value:
            raise RestoreError(f"{window.name}: the {mb.NAMES[command]} reads {found:#x} after {value:#x} was set")
