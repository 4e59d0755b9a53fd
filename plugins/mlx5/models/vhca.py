"""One VF as the firmware has it: enabled or not, suspended or not, its inner state in blocks, what was saved of it.

It must not know commands, their forms or the PF's memory; `migration` moves it.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plugins.mlx5.models.caps import Capabilities
from plugins.mlx5.models.engine import Engine
from plugins.mlx5.models.image import FULL, INCREMENTAL, Body, Geometry, Pattern, Reader, pack_meta
from plugins.mlx5.models.queue import CommandQueue
from plugins.mlx5.models.segment import Segment

NOTHING_WANTED: Mapping[str, Any] = {"promisc": 0, "lists": {}}
"""Of a vport, as after a reset."""


@dataclass(slots=True)
class Series:
    """A save from its first image on: `body` is what is being saved, None between two."""

    number: int
    ordinal: int = 0
    body: Body | None = None


@dataclass(slots=True)
class Function:
    """The parts of the VF that its guest sees."""

    segment: Segment
    queue: CommandQueue
    engine: Engine
    wanted: Callable[[], Mapping[str, Any]]
    want: Callable[[Mapping[str, Any]], None]
    """What it wants its vport to let in: as it is, and as it is to be."""
    issi: int = 0


@dataclass(slots=True)
class Vhca:
    """The state of VF `index`. `versions` counts the changes of each block of inner state that was ever changed."""

    index: int
    vhca_id: int
    caps: Capabilities
    geometry: Geometry
    pattern: Pattern
    function: Function | None = None
    enabled: bool = False
    initiator_stopped: bool = False
    responder_stopped: bool = False
    tracking: bool = False
    saving: bool = False
    """A SAVE or LOAD is at work."""
    generation: int = 0
    """Grows with every reset, so that what was at work notices."""
    versions: dict[int, int] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    """Blocks that changed since they were last put into a body, while tracking."""
    seen: int = -1
    """The engine's count of changes when the last body was made."""
    series: Series | None = None
    reader: Reader | None = None
    spoiled: bool = False
    """A LOAD failed: nothing but a reset helps."""

    @property
    def function_id(self) -> int:
        """Its number in commands that name functions."""
        return self.index + 1

    @property
    def parts(self) -> Function:
        """The guest's side, which is there once the card is put together."""
        assert self.function is not None
        return self.function

    def touch(self, number: int) -> tuple[int, int]:
        """A part of the inner state changes: its block and the block's new version."""
        block = number * 7919 % self.geometry.blocks
        version = self.versions.get(block, 0) + 1
        self.versions[block] = version
        if self.tracking:
            self.changed.add(block)
        return block, version

    def reset(self, key: bytes) -> None:
        """FLR: suspension, tracking and everything that was saved or loaded is forgotten; the inner state is new."""
        self.generation += 1
        self.initiator_stopped = self.responder_stopped = self.tracking = self.saving = self.spoiled = False
        self.series = self.reader = None
        self.versions.clear()
        self.changed.clear()
        self.seen = -1
        self.pattern = Pattern(key, self.geometry)
        if self.function is not None:
            self.function.engine.reset()
            self.function.queue.reset()
            self.function.segment.reset()
            self.function.issi = 0
            self.function.want(NOTHING_WANTED)

    # bodies

    @property
    def has_changed(self) -> bool:
        """Something happened since the last body was made."""
        return bool(self.changed) or self.parts.engine.changes != self.seen

    def make_body(self, *, incremental: bool, final: bool, most: int | None = None) -> Body:
        """All of the state, or what changed since the last body, but no more than `most` bytes of it."""
        state, wire = self.parts.engine.take()
        state |= {
            "key": self.pattern.key.hex(),
            "queue": self.parts.segment.snapshot(),
            "waiting": self.parts.queue.waiting,
            "issi": self.parts.issi,
        }
        if (wanted := self.parts.wanted()) != NOTHING_WANTED:
            state["vport"] = wanted
        meta = pack_meta(state, wire)
        if incremental:
            blocks = sorted(self.changed)
            if most is not None:
                blocks = blocks[: max(0, most - len(meta)) // self.geometry.block_size]
            self.changed -= set(blocks)
            versions = {block: self.versions[block] for block in blocks}
            kind = INCREMENTAL
        else:
            self.changed.clear()
            blocks, versions, kind = [], dict(self.versions), FULL
        self.seen = self.parts.engine.changes
        numbers = blocks if incremental else range(self.geometry.blocks)
        return Body(kind, meta, numbers, versions, self.pattern, self.geometry, final=final)

    def incremental_length(self) -> int:
        """Bytes of the body that `make_body(incremental=True)` would make."""
        blocks = sorted(self.changed)
        return Body(INCREMENTAL, b"", blocks, {}, self.pattern, self.geometry, final=False).length

    def take_over(self, reader: Reader) -> None:
        """What was loaded becomes the state."""
        assert reader.meta is not None
        state, wire = reader.meta
        self.pattern = Pattern(bytes.fromhex(state["key"]), self.geometry)
        self.versions = dict(reader.versions)
        parts = self.parts
        parts.engine.put(state, wire)
        parts.segment.restore(state["queue"])
        parts.queue.restore(state["waiting"])
        parts.issi = state["issi"]
        parts.want(state.get("vport", NOTHING_WANTED))


def fresh_key(seed: str, index: int, generation: int) -> bytes:
    """The key of a VF's inner state: other cards and other lives of the same VF have others."""
    return hashlib.sha256(f"{seed}:{index}:{generation}".encode()).digest()[:16]
