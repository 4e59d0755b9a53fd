"""Writing a saved state into a device at rest, in the profile's order, and comparing what it then reads.

The state has been checked before. It must not know where the state came from: a stream, the source's own save, a reset.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from plugins.generic_dmaq.bench import Bench
from plugins.generic_dmaq.hooks import Hooks
from plugins.generic_dmaq.transforms import ByHook
from vfu_server.errors import RestoreError


@dataclass(frozen=True, slots=True)
class State:
    """What travels: the saved registers by name, and the inner memory unless it could not be read."""

    values: Mapping[str, int]
    memory: bytes | None = None


async def quiet(bench: Bench, seconds: float) -> None:
    """Mask the device's interrupts, wait until nothing is left to do, and take back interrupts of old."""
    interrupts = bench.layout.profile.interrupts
    for name, value in interrupts.mask:
        bench.port.write(name, value)
    await bench.wait_empty(seconds, bench.layout.profile.settle_seconds)
    for name, value in interrupts.clear:
        bench.port.write(name, value)


async def restore(bench: Bench, hooks: Hooks, state: State) -> None:
    """Write the whole state and compare. RestoreError: the hardware did not take it; DeadlineError: a step hangs."""
    await hooks.restore_begin(state.values)
    if state.memory is not None and not await hooks.restore_memory(state.memory):
        raise RestoreError(f"{bench.host.name}: the device's memory was saved, but cannot be written here")
    await restore_registers(bench, hooks, state.values, state.values.keys())
    compare(bench, state.values)
    write_again(bench, state.values)


async def restore_registers(bench: Bench, hooks: Hooks, values: Mapping[str, int], names: Collection[str]) -> None:
    """Write the registers `names`, in restore order, each as its transform says."""
    for register in bench.layout.saved:
        if register.name not in names:
            continue
        transform = bench.layout.plans[register.name].restore
        if isinstance(transform, ByHook):
            await hooks.restore(register, values[register.name], values)
        else:
            transform.write(bench.port, register, values[register.name])


def write_again(bench: Bench, values: Mapping[str, int]) -> None:
    """Undo what reading `values` did to the registers whose reads act."""
    for register in bench.layout.saved:
        plan = bench.layout.plans[register.name]
        if plan.reads_act and register.name in values:
            plan.restore.write(bench.port, register, values[register.name])


def compare(bench: Bench, values: Mapping[str, int]) -> None:
    """RestoreError if a register does not read as it was saved, naming all that differ, decoded."""
    wrong = []
    for register in bench.layout.saved:
        mask = bench.layout.plans[register.name].verify
        if not mask or register.name not in values:
            continue
        wanted, found = values[register.name], bench.port.read(register.name)
        if (wanted ^ found) & mask:
            wrong.append(f"{register.decode(found)} instead of {register.decode(wanted)}")
    if wrong:
        raise RestoreError(f"{bench.host.name}: the device did not take its state: {'; '.join(wrong)}")
