"""A plugin whose device is migrated by a stand-in for its driver in the kernel: a data fd that gives bytes as fast as
memory is. Everything above the file's read is the product's: the state file, the kit's device, the session.

The option `control` names a JSON file: `late` bytes of state, as plugin.py has it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from vfu_server import uapi
from vfu_server.device import Device
from vfu_server.errors import UsageError
from vfu_server.hookspecs import hookimpl
from vfu_server.host.ioctl import Kernel
from vfu_server.host.kernel_migration import KernelStateFile
from vfu_server.host_device import HostDevice, StateFile
from vfu_server.kernel_migration import KernelMigrationDevice
from vfu_server.policy import Answer, Answers, Policy, Rule
from vfu_server.uapi import MigState

VFU_SERVER_API = 1
CHUNK = 1 << 20


class _Driver:
    """The calls that a state file makes: a read gives the same memory until `left` bytes are gone."""

    def __init__(self, left: int) -> None:
        self._left = left

    def read(self, fd: int, size: int) -> bytes:
        """As the data fd of the loop in C: a file in memory, read from its start."""
        size = min(size, self._left)
        self._left -= size
        return os.pread(fd, size, 0)


class _Door:
    """A MigrationDoor."""

    flags = uapi.MIGRATION_STOP_COPY
    migrator = "stand-in"

    def __init__(self, control: Path) -> None:
        self._control = control
        self._memory = os.memfd_create("state", os.MFD_CLOEXEC)
        os.write(self._memory, b"\x5a" * CHUNK)
        self._state = MigState.RUNNING

    def _late(self) -> int:
        return int(json.loads(self._control.read_text())["late"])

    async def set_state(self, state: MigState) -> StateFile | None:
        self._state = state
        if state is not MigState.STOP_COPY:
            return None
        kernel = cast("Kernel", _Driver(self._late()))
        return KernelStateFile(kernel, os.dup(self._memory), "stand-in", reinit=False)

    async def state(self) -> MigState:
        return self._state

    async def data_size(self) -> int:
        return self._late()


class _Device(KernelMigrationDevice):
    """Whose reset is the stand-in's."""

    async def reset(self) -> None:
        await self.run_again()


@hookimpl
def vfu_server_probe(host: HostDevice, options: Mapping[str, str]) -> Device | None:
    """Takes whatever it is given."""
    if set(options) != {"control"}:
        raise UsageError("the plugin benchmark_kernel has one option, control=FILE")
    setattr(host, "migration", _Door(Path(options["control"])))  # noqa: B010 - a door that has none of its own
    answers = Answers.always(Answer.PASS)
    rules = [Rule(r.index, 0, r.size, answers, answers, "all") for r in host.regions[:6] if r.size]
    return _Device(host, Policy(rules))
