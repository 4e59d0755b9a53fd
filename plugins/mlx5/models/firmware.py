"""Executing commands: which there are, whether one may come now and is well formed, and its answer.

What each command does is in the `commands_*` modules. Order of checks (model): opcode, state of the function, input
length, header, reserved bits, room for the output, and then the command's own.
"""

import enum
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from plugins.mlx5.models.layouts import Layout
from plugins.mlx5.models.orders import Orders
from plugins.mlx5.models.queue import CommandQueue, Request
from plugins.mlx5.models.status import RefusedError, Status, Violations

logger = logging.getLogger(__name__)


class Stage(enum.IntEnum):
    """How far a function's driver has come."""

    RESET = 0
    ENABLED = 1
    """ENABLE_HCA was done."""
    READY = 2
    """INIT_HCA was done."""


@dataclass(frozen=True, slots=True)
class Call:
    """A command that is well formed. `tail`: what follows the fixed part. `answer`: for a `run` that gave None."""

    values: dict[str, int]
    op_mod: int
    tail: bytes
    data: bytes
    room: int
    answer: Callable[[bytes | RefusedError], None]

    def want_room(self, size: int) -> None:
        """RefusedError if the driver has not left as many bytes for the output."""
        if self.room < size:
            raise RefusedError(Status.BAD_OUTPUT_LENGTH, 0x101, f"room for {self.room} bytes of {size}")


@dataclass(frozen=True, slots=True)
class Command:
    """A command. `element`: bytes of the units that follow the fixed part (0: nothing follows). `op_mods` None: all."""

    opcode: int
    layout: Layout
    run: Callable[[Call], bytes | None]
    out: int = 0x10
    stage: Stage = Stage.READY
    op_mods: frozenset[int] | None = frozenset({0})
    element: int = 0
    most: int = 0x40000


class Firmware:
    """The commands of one function. `stage` says how far it is."""

    def __init__(self, stage: Callable[[], Stage], orders: Orders, violations: Violations) -> None:
        self._stage = stage
        self._orders = orders
        self._violations = violations
        self._commands: dict[int, Command] = {}
        self.counts: dict[int, int] = {}

    def add(self, commands: Iterable[Command]) -> None:
        """More commands."""
        for command in commands:
            assert command.opcode not in self._commands
            self._commands[command.opcode] = command

    def execute(self, queue: CommandQueue, request: Request) -> None:
        """Do a command and have its entry given back, now or when it is done."""

        def answer(output: bytes | RefusedError) -> None:
            if isinstance(output, RefusedError):
                output = self._refusal(request, output)
            queue.finish(request, output)

        self.counts[request.opcode] = self.counts.get(request.opcode, 0) + 1
        ordered = self._orders.take_for("status", request.opcode)
        if ordered:
            status, syndrome = ordered[0] & 0xFF, ordered[1] if len(ordered) > 1 else 0xFA017
            answer(RefusedError(status, syndrome & 0xFFFFFFFF, "as ordered", mistake=False))
            return
        try:
            done = self._run(request, answer)
        except RefusedError as refusal:
            answer(refusal)
            return
        if done is not None:
            answer(done)

    def _run(self, request: Request, answer: Callable[[bytes | RefusedError], None]) -> bytes | None:
        command = self._commands.get(request.opcode)
        if command is None:
            raise RefusedError(Status.BAD_OP, 0x102, f"there is no command {request.opcode:#x}")
        name, data = command.layout.name, request.data
        if self._stage() < command.stage:
            raise RefusedError(
                Status.BAD_SYS_STATE, 0x103, f"{name} in the stage {self._stage().name}, not {command.stage.name}"
            )
        tail = data[command.layout.size :]
        if len(data) < command.layout.size or len(data) > command.most:
            raise RefusedError(Status.BAD_INPUT_LENGTH, 0x104, f"{name} of {len(data)} bytes")
        if tail and (not command.element or len(tail) % command.element):
            raise RefusedError(Status.BAD_INPUT_LENGTH, 0x104, f"{name} of {len(data)} bytes")
        values = command.layout.unpack(data)
        op_mod = values["op_mod"]
        if values["uid"]:
            raise RefusedError(Status.BAD_PARAM, 0x105, f"{name} with uid {values['uid']:#x}")
        if command.op_mods is not None and op_mod not in command.op_mods:
            raise RefusedError(Status.BAD_PARAM, 0x106, f"{name} with op_mod {op_mod:#x}")
        strays = command.layout.strays(data)
        if strays:
            places = ", ".join(f"{at:#x}" for at in strays)
            raise RefusedError(Status.BAD_PARAM, 0x107, f"{name} with ones in reserved bits at {places}")
        call = Call(values, op_mod, tail, data, request.room, answer)
        call.want_room(command.out)
        return command.run(call)

    def _refusal(self, request: Request, refusal: RefusedError) -> bytes:
        what = f"command {request.opcode:#x}: {refusal} (status {refusal.status:#x}, syndrome {refusal.syndrome:#x})"
        if refusal.mistake:
            self._violations.note(f"status-{refusal.status:#04x}", what)
        else:
            logger.info("%s", what)
        return (refusal.status << 56 | refusal.syndrome).to_bytes(8, "big").ljust(0x10, b"\0")
