"""Bringing a function to rest, and letting it go on: pause, idle checks, write-back of its queues' contexts, restart.

It must not know what is saved. Source: hisi_acc_vfio_pci.c, the arcs RUNNING to STOP and STOP to RUNNING.
"""

import errno
from dataclasses import dataclass
from typing import Final

import trio

from plugins.hns import mailbox as mb
from plugins.hns.doorbell import AEQ, EQ, Doorbell, restart
from plugins.hns.mailbox import Mailbox
from plugins.hns.pf import PhysicalFunction
from plugins.hns.polling import Looks
from plugins.hns.registers import VF
from plugins.hns.vft import Queues, queues_of
from plugins.hns.window import Window
from vfu_server.errors import DeadlineError, HostError, StateLostError, VfuServerError

IDLE_LOOKS: Final = 100
IDLE_PAUSE: Final = 0.0001
"""Each status is read so often, with so many seconds between, before it counts as an error."""
WRITE_BACK_SECONDS: Final = 1.0
"""The kernel's driver waits 1 ms; the hardware needs some microseconds."""
READY_SECONDS: Final = 0.001
"""How long the guest's driver may be on its way to `ready`."""


@dataclass(frozen=True, slots=True)
class AtRest:
    """What is known of a function that was brought to rest. `paused`: it was running queues, and was paused."""

    queues: Queues
    paused: bool


class NotIdleError(HostError):
    """The function, its message interface or its device's error status is not at rest."""

    default_errno = errno.EBUSY


async def read_queues(mailbox: Mailbox) -> Queues:
    """The queues that the PF has given to this function."""
    return queues_of(await mailbox.get(mb.SQC_VFT))


async def stop(window: Window, mailbox: Mailbox, pf: PhysicalFunction | None) -> AtRest:
    """Pause the function and write its contexts back to memory. If that fails, it is let go on before this raises;
    StateLostError if that fails, too.

    A function without a table of SQ contexts has no queue that could run, so that nothing is to be paused: what takes
    a pause back is the restart of its queues, which needs their contexts.
    """
    queues = await read_queues(mailbox)
    if not await mailbox.get(mb.SQC_TABLE):
        return AtRest(queues, paused=False)
    rest = AtRest(queues, paused=True)
    try:
        await mailbox.set(mb.PAUSE_FUNCTION)
        await check_idle(window, pf)
        await write_back(window)
    except BaseException as error:
        try:
            go_on(window, rest)  # sync: also when cancelled
        except HostError as second:
            raise StateLostError(f"{error}; then it could not be let go on: {second}") from error
        raise
    return rest


async def start(window: Window, mailbox: Mailbox, rest: AtRest, *, events: bool) -> None:
    """Let a function go on that was paused or restored; `events`: raise those that are pending. If that fails, it is
    paused again before this raises; StateLostError if that fails, too.
    """
    try:
        go_on(window, rest)
        if events:
            ring_events(window)
    except HostError as error:
        with trio.CancelScope(shield=True):
            try:
                await mailbox.set(mb.PAUSE_FUNCTION)
            except VfuServerError as second:
                raise StateLostError(f"{error}; then it could not be paused again: {second}") from error
        raise


def go_on(window: Window, rest: AtRest) -> None:
    """Let the function go on: acknowledge the PF's message, take its messages again, restart each paused queue.

    The kernel's driver counts the queues on a target only; here the count is what was read when it was stopped.
    """
    window.write("ifc_int_source", 1)
    window.write("ifc_int_mask", 0)
    if rest.paused:
        for queue in range(rest.queues.count):
            window.ring(restart(queue))


def ring_events(window: Window) -> None:
    """Ring EQ and AEQ doorbells with the heads as they are: an interrupt that was pending comes again."""
    window.ring(Doorbell(EQ, index=window.read("eqc0") & 0xFFFF))
    window.ring(Doorbell(AEQ, index=window.read("aeqc0") & 0xFFFF))


async def check_idle(window: Window, pf: PhysicalFunction | None) -> None:
    """Wait for no error on the PF, and no message between PF and VF under way. NotIdleError names the register."""
    if pf is not None:
        await _zero_on_pf(window, pf, "qm_error_status")
    for name in ("ifc_int_status", "ifc_int_set"):
        await _zero(window, name)
    if pf is not None:
        await _zero_on_pf(window, pf, "core_status")


async def _zero(window: Window, name: str) -> None:
    value = 0
    for _ in range(IDLE_LOOKS):
        if not (value := window.read(name)):
            return
        await trio.sleep(IDLE_PAUSE)
    raise NotIdleError(f"{window.name}: a message between it and its PF is under way ({VF[name].decode(value)})")


async def _zero_on_pf(window: Window, pf: PhysicalFunction, name: str) -> None:
    value = 0
    for _ in range(IDLE_LOOKS):
        if not (value := pf.read(name)):
            return
        await trio.sleep(IDLE_PAUSE)
    raise NotIdleError(f"{window.name}: its PF {pf.name} has an error ({pf.register(name).decode(value)})")


async def write_back(window: Window) -> None:
    """Write the contexts of the queues to their tables in memory, which travel with the guest. DeadlineError."""
    window.write("write_back_start", 1)
    async for _ in Looks(WRITE_BACK_SECONDS):
        if window.read("write_back_done") & 1:
            return
    raise DeadlineError(
        f"{window.name}: the write-back of queue contexts is not done after {WRITE_BACK_SECONDS:g} s "
        f"({window.show('write_back_done')})"
    )


async def is_ready(window: Window) -> bool:
    """Whether the guest's driver is loaded."""
    async for _ in Looks(READY_SECONDS):
        if not window.read("vf_state") & 1:
            return True
    return False
