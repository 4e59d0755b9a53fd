"""The contract between the server and a vendor's plugin: the `Device` that a plugin returns from its probe.

A Device knows its hardware and the door to it. It knows nothing of clients, sockets, streams on the wire or the state
table: the session calls it one step at a time and never two coroutines of one device at once.
"""

import enum
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vfu_server.companion import Companions
from vfu_server.errors import PluginError
from vfu_server.host_device import HostDevice
from vfu_server.policy import Policy


class StopKind(enum.Enum):
    """How far a device is to stop."""

    P2P = "p2p"
    """It starts no DMA any more but still accepts accesses from its peers."""
    FULL = "full"
    """No DMA, no interrupt, no change of its own."""


class SavePhase(enum.Enum):
    """What a save is asked for."""

    PRE_COPY = "pre-copy"
    """The device runs; give what can be given early. Returning means: nothing more for now."""
    STOP_COPY = "stop-copy"
    """The device is stopped; give the rest. Returning means: this was all."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the saved state as the plugin wrote it.

    `tag` is the plugin's own name for it (ASCII, 1 to 16 characters), `version` its layout. An `optional` section may
    be skipped by a reader that does not know it.
    """

    tag: str
    version: int
    payload: bytes
    optional: bool = False


class Sink(Protocol):
    """Where a save puts its sections. Sending waits while the client has not fetched what is there: memory stays
    bounded.
    """

    async def send(self, section: Section) -> None:
        """Put one section. Returned: it will arrive. Raised, also Cancelled: nothing of it will."""
        ...


@dataclass(frozen=True, slots=True)
class PrecopyInfo:
    """What a pre-copy has still to give, in bytes: a section counts until `Sink.send` has returned.

    `initial_bytes`: of the first pass, which a destination should have before the device is stopped. `dirty_bytes`:
    what has changed since it was given. `reinit`: a new first pass began since the last question.
    """

    initial_bytes: int = 0
    dirty_bytes: int = 0
    reinit: bool = False


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can do. `migratable` False needs a `reason` that an operator understands."""

    migratable: bool = True
    reason: str = ""
    pre_copy: bool = False
    p2p: bool = False
    resets: bool = False
    """`Device.reset` works even where the door has no reset: the plugin writes reset values."""


@dataclass(frozen=True, slots=True)
class StateIdentity:
    """What must be equal (or accepted by `check_identity`) on both sides of a migration.

    `state_version` is that of the plugin's own sections, `variant` the plugin's name for the kind of device (profile,
    family), `firmware` may be empty, `features` are bits of the plugin's choice.
    """

    variant: str
    state_version: int
    firmware: str = ""
    features: int = 0


@dataclass(frozen=True, slots=True)
class ModelCommand:
    """How `--model NAME` is started: `python -m module *args`, with `--socket-path P` appended by the server."""

    module: str
    summary: str
    args: Sequence[str] = field(default=())


class DeviceLog(Protocol):
    """A log of the guest pages that the device writes, kept by the hardware itself and read by the plugin.

    Asked for by one coroutine at a time, at any state of the device, also while it saves.
    """

    async def start(self, ranges: Sequence[tuple[int, int]], page_size: int) -> int:
        """Begin to follow `(iova, length)` ranges, ascending; returns the page size in bytes that is really used. A log
        that is kept already is forgotten. Raises HostError: none is kept.
        """
        ...

    async def report(self, iova: int, length: int, page_size: int) -> bytes:
        """The pages of a range, which lies within those followed, that were written since it was last asked for: a bit
        each, lowest first, in whole 64-bit words. Raises HostError: nobody knows, so all of them count.
        """
        ...

    async def stop(self) -> None:
        """Forget the log. Harmless if none is kept."""
        ...


class Device(ABC):
    """One device under a plugin's care.

    Life: constructed by the probe; `open` once; `start`, `stop`, `save`, `load`, `load_done` and `reset` as the
    client's migration states demand; `aclose` at the end. A device is found running and is left running or reset.
    `lock` is for what trap methods (called from the pump's thread) and coroutines share; it must never be held over an
    await.
    """

    def __init__(self, host: HostDevice) -> None:
        self.host = host
        self.lock = threading.Lock()

    async def open(self, companions: Companions) -> None:
        """Open what the device needs beside its own door, find out what its declarations say.

        Called once, after this plugin alone took the device; no declaration has been read, no client may come before it
        returns. May take its time. Raises HostError, PluginError: the device is not served; `aclose` is called all the
        same.
        """
        return None

    # declarations: read once, right after `open`

    @property
    @abstractmethod
    def identity(self) -> StateIdentity:
        """What a destination must be to take this device's state."""

    @property
    @abstractmethod
    def policy(self) -> Policy:
        """Which access is answered how, in which state."""

    @property
    def region_sizes(self) -> Mapping[int, int]:
        """Regions of which a client sees less than the door has: index and bytes, from the region's start.

        What lies behind is the plugin's alone: to a client it does not exist, whatever the policy says. A BAR's size is
        a power of two.
        """
        return {}

    @property
    def capabilities(self) -> Capabilities:
        """STOP_COPY only, unless overridden."""
        return Capabilities()

    @property
    def dirty_log(self) -> DeviceLog | None:
        """The hardware's own log of its DMA, if the plugin can have it kept; it goes before any that the door knows.
        Read once, after `open`.
        """
        return None

    # accesses: sync, bounded, in the pump's thread, any state whose rule says TRAP

    def trap_read(self, region: int, offset: int, width: int) -> int:
        """Value of a read that the policy answers with TRAP. Raises VfuServerError: its errno is the reply."""
        raise PluginError(
            f"{type(self).__name__} declares TRAP for reads of region {region} at {offset:#x} but has no trap_read"
        )

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        """Take a write that the policy answers with TRAP."""
        raise PluginError(
            f"{type(self).__name__} declares TRAP for writes of region {region} at {offset:#x} but has no trap_write"
        )

    def trap_read_block(self, region: int, offset: int, length: int) -> bytes:
        """A trapped read of another length, where a rule allows WIDTH_ANY: byte by byte, unless overridden."""
        return b"".join(self.trap_read(region, offset + i, 1).to_bytes(1, "little") for i in range(length))

    def trap_write_block(self, region: int, offset: int, data: bytes) -> None:
        """A trapped write of another length, as `trap_read_block`."""
        for i, byte in enumerate(data):
            self.trap_write(region, offset + i, 1, byte)

    def shadow_write(self, region: int, offset: int, width: int, value: int) -> None:
        """Apply a write that was kept while the policy answered SHADOW; called in order, after `start`, in the
        session's thread.
        """
        self.host.write(region, offset, width, value)

    # state changes: coroutines of the session's task

    @abstractmethod
    async def stop(self, kind: StopKind) -> None:
        """Bring the device to rest. The policy has been switched before: no new access comes in.

        May wait (with a deadline of its own below 4 s; pre-copy has none). If it raises, the device must go on as
        before: the session then switches the policy back and the client keeps its old state. Where nobody can say that
        it does, raise StateLostError (so may `start`, `save_begin`, `save_end`, `load_begin` and `load_done`).
        """

    @abstractmethod
    async def start(self, kind: StopKind) -> None:
        """Undo `stop(kind)`. Called also on a device that was just restored. If it raises, the device stays stopped."""

    async def reset(self) -> None:
        """Bring the device to its reset state, from any state. The door's ladder, unless the hardware needs more."""
        await self.host.reset()

    async def estimate(self) -> int:
        """Bytes that a STOP_COPY would give now; a good guess is enough. Any state."""
        return 4096

    async def precopy_info(self) -> PrecopyInfo:
        """What a PRE_COPY could give now. States PRE_COPY and PRE_COPY_P2P, also while `save` is at an await."""
        return PrecopyInfo()

    async def save_begin(self) -> None:
        """A save session is opened, as a part of the state change: on a device that runs or is stopped. `save` follows.

        If it raises, the change is refused, and nothing may have changed.
        """
        return None

    @abstractmethod
    async def save(self, phase: SavePhase, sink: Sink) -> None:
        """Give the device's state to `sink`. STOP_COPY: once, the device stopped; it must be left such that `start`
        goes on as before. PRE_COPY: again and again, whenever `precopy_info` tells of more.

        Cancelled when the client goes on or gives up; the device must then still be startable. Raises: the save fails
        with that errno.
        """

    async def save_end(self) -> None:
        """A save session is over, whatever became of it: changes need not be followed any more."""
        return None

    def check_identity(self, identity: StateIdentity) -> None:
        """Raise StreamMismatchError if state of `identity` cannot be loaded. The default asks for equality but for
        features.
        """
        from vfu_server.errors import StreamMismatchError

        mine = self.identity
        for name in ("variant", "state_version", "firmware"):
            theirs_value, mine_value = getattr(identity, name), getattr(mine, name)
            if theirs_value != mine_value:
                raise StreamMismatchError(
                    f"the state was saved for {name} {theirs_value!r}, this device has {mine_value!r}"
                )

    async def load_begin(self) -> None:
        """RESUMING was entered: forget what an earlier, abandoned load has left."""
        return None

    def knows(self, tag: str, version: int) -> bool:
        """Whether `load` understands such a section: an unknown optional one is skipped, any other refuses."""
        return True

    @abstractmethod
    async def load(self, section: Section) -> None:
        """Take one section whose sum was right. Keep it; touch the hardware only where a reset makes it harmless."""

    @abstractmethod
    async def load_done(self) -> None:
        """All sections are in and checked: write them to the hardware and verify by reading back. The device stays
        stopped.

        Interrupts are set up by the client already. Raises StreamFormatError (something is missing), RestoreError.
        """

    def statistics(self) -> Mapping[str, int]:
        """Counters of the plugin's choice for the log and metrics."""
        return {}

    async def aclose(self) -> None:
        """The server is done with the device (the door is closed by the server)."""
        return None
