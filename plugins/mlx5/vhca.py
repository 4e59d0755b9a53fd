"""The migration commands for one virtual function, named by its vhca_id.

It knows no order and keeps no state: `saving`, `loading` and `driven` do. Source: Linux' mlx5-vfio-pci (cmd.c).
"""

import enum
from dataclasses import dataclass
from typing import Final

from plugins.mlx5.buffers import MAX_IMAGE, StateBuffer
from plugins.mlx5.commands import Commands
from plugins.mlx5.layouts import (
    LOAD_VHCA_STATE,
    QUERY_VHCA_MIGRATION_STATE,
    RESUME_VHCA,
    SAVE_VHCA_STATE,
    SUSPEND_VHCA,
)

STATE_SECONDS: Final = 3.0
"""For what is part of a change of state: the client waits 5 s for all of it."""
STATE_UNKNOWN: Final = 0
STATE_INIT: Final = 4
"""migration_state: the function was set up anew, what it gives next is a first pass again."""


class Part(enum.Enum):
    """What is stopped: initiator first, responder after it, resumed in the opposite order."""

    INITIATOR = "initiator"
    """It starts requests."""
    RESPONDER = "responder"
    """It answers those of its peers."""


_SUSPEND: Final = {Part.INITIATOR: 0, Part.RESPONDER: 1}
_RESUME: Final = {Part.RESPONDER: 0, Part.INITIATOR: 1}


@dataclass(frozen=True, slots=True)
class Query:
    """What a function has to give: `required` bytes of the next image, `remaining` of all (chunk mode, else 0)."""

    required: int
    remaining: int
    state: int

    @property
    def size(self) -> int:
        """All that a save would give now."""
        return self.remaining or self.required


@dataclass(frozen=True, slots=True)
class Saved:
    """An image was written: `size` bytes; `following`: what the next one needs at least, 0 if it was the last."""

    size: int
    following: int


class Vhca:
    """One function. `chunks`: the firmware gives its state in chunks; `states`: it tells how far the function is. Every
    call raises as `Commands.call`.
    """

    def __init__(self, queue: Commands, vhca_id: int, *, chunks: bool, states: bool = False) -> None:
        self.queue = queue
        self.vhca_id = vhca_id
        self.chunks = chunks
        self.states = states

    async def suspend(self, part: Part) -> None:
        """Stop a part."""
        await self.queue.call(SUSPEND_VHCA, op_mod=_SUSPEND[part], vhca_id=self.vhca_id, seconds=STATE_SECONDS)

    async def resume(self, part: Part) -> None:
        """Let a part go on."""
        await self.queue.call(RESUME_VHCA, op_mod=_RESUME[part], vhca_id=self.vhca_id, seconds=STATE_SECONDS)

    async def query(self, *, incremental: bool) -> Query:
        """What it has to give: all, or what has changed since the last tracked save. Never while a save runs."""
        answer = await self.queue.call(
            QUERY_VHCA_MIGRATION_STATE,
            incremental=int(incremental),
            chunk=int(self.chunks),
            vhca_id=self.vhca_id,
            seconds=STATE_SECONDS,
        )
        remaining = answer["remaining_total_size"] if self.chunks else 0
        state = answer["migration_state"] if self.states else STATE_UNKNOWN
        return Query(answer["required_umem_size"], remaining, state)

    async def save(self, buffer: StateBuffer, *, incremental: bool, track: bool) -> Saved:
        """Have an image written into `buffer`; may take as long as the firmware's time-out says."""
        answer = await self.queue.call(
            SAVE_VHCA_STATE,
            incremental=int(incremental),
            set_track=int(track),
            vhca_id=self.vhca_id,
            mkey=buffer.mkey,
            size=min(buffer.capacity, MAX_IMAGE),
        )
        return Saved(answer["actual_image_size"], answer["next_required_umem_size"])

    async def load(self, buffer: StateBuffer, size: int) -> None:
        """Have the image of `size` bytes in `buffer` read."""
        await self.queue.call(LOAD_VHCA_STATE, vhca_id=self.vhca_id, mkey=buffer.mkey, size=size)
