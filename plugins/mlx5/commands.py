"""How commands are sent (`Commands`), for those who do not care which queue does it.

Objects that the firmware makes are named by numbers, and after a reset others get the same numbers: `Bound` sends
nothing any more once the function was brought up anew.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from plugins.mlx5.layouts import Command
from plugins.mlx5.status import PfDeadError

NOTHING: Final[Mapping[str, int]] = MappingProxyType({})


class Answer:
    """What a command gave back: fields by name, and what follows the fixed part."""

    def __init__(self, command: Command, data: bytes) -> None:
        self._layout = command.output
        self.data = data

    def __getitem__(self, name: str) -> int:
        return self._layout.get(self.data, name)

    @property
    def tail(self) -> bytes:
        """What follows the fixed part."""
        return self.data[self._layout.size :]


@dataclass(frozen=True, slots=True)
class Request:
    """A command ready to go. `length`: bytes of the answer that is expected; `seconds` None: the firmware's time-out;
    `pages`: it feeds pages, and must not wait for a command that waits for them.
    """

    command: Command
    message: bytes
    length: int
    seconds: float | None
    pages: bool


class Commands(ABC):
    """Sends commands and waits for their answers. `name`: the function's; `epoch`: how often its queue was opened."""

    name: str
    epoch: int

    async def call(
        self,
        command: Command,
        values: Mapping[str, int] = NOTHING,
        *,
        op_mod: int = 0,
        tail: bytes = b"",
        room: int = 0,
        seconds: float | None = None,
        pages: bool = False,
        **fields: int,
    ) -> Answer:
        """Send a command and wait for its answer: `values` and `fields` are its fields, `tail` follows its fixed part,
        and `room` bytes the answer's.

        It is not given up when the caller is cancelled: whoever owns the memory that it uses learns its end. Raises
        CommandError, CommandLostError (it may still act), PfDeadError.
        """
        message = command.encode(op_mod, tail, **values, **fields)
        request = Request(command, message, command.output.size + room, seconds, pages)
        return Answer(command, await self.send(request))

    @abstractmethod
    async def send(self, request: Request) -> bytes:
        """The answer's bytes. Raises as `call`."""


class Bound(Commands):
    """The commands of a function until it is brought up anew."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self.name = commands.name
        self.epoch = commands.epoch

    async def send(self, request: Request) -> bytes:
        """PfDeadError: what it would name is another's now."""
        if self._commands.epoch != self.epoch:
            raise PfDeadError(f"{self.name}: it was reset; {request.command.name} would be for what it has forgotten")
        return await self._commands.send(request)
