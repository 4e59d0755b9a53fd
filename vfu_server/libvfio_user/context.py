"""One device presented to one client at a time: declarations go down to C, events and traps come up.

A trap's life: (1) the pump's thread runs the library; (2) the library calls our C table, which calls `vs_trap` with our
handle and takes the GIL; (3) `vs_trap` finds the Context and calls one method of its TrapTarget; (4) a VfuServerError
becomes the errno of the reply, any other exception is kept as a Fault event, and the client gets EIO; (5) the Fault
wakes trio, where the session logs and counts it.
"""

import errno
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vfu_server.errors import VfuServerError
from vfu_server.host_device import IrqInfo, RegionInfo
from vfu_server.libvfio_user.door import NativeDoor
from vfu_server.libvfio_user.native import check, ffi, lib
from vfu_server.libvfio_user.ring import Ring
from vfu_server.libvfio_user.trace import Trace
from vfu_server.policy import NUM_ANSWERS, NUM_CLASSES, Answer, StateClass
from vfu_server.uapi import MAX_DATA_XFER_SIZE, Command, HeaderFlag

RING_SIZE = 3 << 20
"""Bytes of migration data on their way; three of the largest messages, so that neither side waits for the other's
wake-up.
"""


MAX_EVENTS = 256
"""Events taken at once: a client can have mistakes noticed as fast as they are taken. More than can be left at its end.
"""


class TrapTarget(Protocol):
    """Who answers trapped accesses, in the pump's thread. A VfuServerError's errno is the reply."""

    def trap_read(self, region: int, offset: int, width: int) -> int:
        """A read of 1, 2, 4 or 8 bytes."""
        ...

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        """A write of 1, 2, 4 or 8 bytes."""
        ...

    def trap_read_block(self, region: int, offset: int, length: int) -> bytes:
        """A read of another length; only where a rule allows WIDTH_ANY."""
        ...

    def trap_write_block(self, region: int, offset: int, data: bytes) -> None:
        """A write of another length; only where a rule allows WIDTH_ANY."""
        ...


class TableRule(Protocol):
    """A compiled rule: answers by state class as bytes of `NUM_CLASSES` numbers (see region.compile_rules)."""

    @property
    def region(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def read(self) -> bytes: ...
    @property
    def write(self) -> bytes: ...
    @property
    def widths(self) -> int: ...
    @property
    def errno(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Connected:
    """A client has negotiated. `max_data_xfer_size` is what it takes in one message, in bytes, capped by ours."""

    max_data_xfer_size: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is over, the pump's thread at its end; `reason` says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that C or the library found wrong with the client, in words."""

    text: str


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception out of a trap that was no VfuServerError: the client got EIO."""

    error: BaseException
    where: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message that Python must answer with `Context.reply`; `fds` are the receiver's to close.

    `tried`: the errno with which C has failed at it already, 0 if it did not try.
    """

    command: Command
    msg_id: int
    no_reply: bool
    payload: bytes
    fds: list[int]
    tried: int = 0


Event = Connected | Disconnected | Notice | Fault | Message


@dataclass(frozen=True, slots=True)
class KeptWrite:
    """A client's write that was kept while its range was shadowed."""

    region: int
    offset: int
    width: int
    value: int


@dataclass(frozen=True, slots=True)
class ContextStatistics:
    """Counters over all connections; `errors` are error replies sent (a posted write has none: see `accesses`).

    `accesses` maps (answer, class, 'read' or 'write') to a count; zero counts are
    left out.
    """

    messages: int
    replies: int
    errors: int
    notices: int
    notices_lost: int
    fds_closed: int
    connections: int
    accesses: dict[tuple[Answer, StateClass, str], int] = field(default_factory=dict)


class Context:
    """A device and the native thread that serves its client.

    `regions` carry the areas that may be mapped (already cut down to the operator's `--mmap`); `rules` come from
    `region.compile_rules`; `flr` are (config offset, bit mask) pairs of bytes whose write resets the function. `trace`
    takes down every access; it outlives the Context.
    """

    def __init__(
        self,
        *,
        name: str,
        regions: Sequence[RegionInfo],
        irqs: Sequence[IrqInfo],
        flags: int,
        rules: Sequence[TableRule],
        door: NativeDoor,
        traps: TrapTarget | None = None,
        flr: Sequence[tuple[int, int]] = (),
        trace: Trace | None = None,
    ) -> None:
        self._traps = traps
        self._trace = trace
        self._faults: deque[Fault] = deque(maxlen=64)
        self._handle = ffi.new_handle(self)
        self._door = door
        self._device = lib.vs_device_new(name.encode(), door.pointer, self._handle, RING_SIZE)
        if self._device == ffi.NULL:
            raise MemoryError
        self._event_fd = int(lib.vs_device_event_fd(self._device))
        self._pending: Any = None
        self.ring = Ring(self._device)
        self.state_class = StateClass.RUNNING
        for region in regions:
            self._declare_region(region)
        for irq in irqs:
            lib.vs_device_set_irq(self._device, irq.index, irq.count, irq.flags)
        lib.vs_device_set_flags(self._device, flags)
        for which, (offset, mask) in enumerate(flr):
            lib.vs_device_set_flr(self._device, which, offset, mask)
        for rule in rules:
            self._add_rule(rule)
        if trace is not None:
            lib.vs_device_set_trace(self._device, trace.pointer)

    def _declare_region(self, region: RegionInfo) -> None:
        check(
            lib.vs_device_set_region(self._device, region.index, region.size, region.flags, region.fd, region.fd_offset)
        )
        for area in region.areas:
            check(lib.vs_device_add_area(self._device, region.index, area.offset, area.size))

    def _add_rule(self, rule: TableRule) -> None:
        compiled = ffi.new("struct vs_rule *")
        compiled.start, compiled.end = rule.start, rule.end
        for i in range(NUM_CLASSES):
            compiled.read[i], compiled.write[i] = rule.read[i], rule.write[i]
        compiled.widths, compiled.error = rule.widths, rule.errno
        check(lib.vs_device_add_rule(self._device, rule.region, compiled))

    # connection

    def attach(self, sock_fd: int) -> None:
        """Serve the client on a connected stream socket, which is taken over. OSError EBUSY before the last one was
        joined.
        """
        self.drop_kept_writes()
        check(lib.vs_device_attach(self._device, sock_fd))

    def detach(self) -> None:
        """End the connection; a Disconnected event follows. Harmless without one."""
        lib.vs_device_shutdown(self._device)

    def join(self) -> None:
        """Wait for the pump's thread; at once after a Disconnected event."""
        self._pending = None
        check(lib.vs_device_join(self._device))

    def peer_gone(self) -> bool:
        """Whether the client has closed its end (there may still be messages to serve), or there is none."""
        return bool(lib.vs_device_peer_gone(self._device))

    def close(self) -> None:
        """End everything. The Context is of no use afterwards; idempotent."""
        if self._device is not None:
            lib.vs_device_free(self._device)
            self._device = None

    # events

    def fileno(self) -> int:
        """An eventfd, readable when `events` would give something."""
        return self._event_fd

    def events(self) -> list[Event]:
        """What has happened, oldest first; never blocks. After so many at once `fileno` stays readable for the rest."""
        found: list[Event] = []
        while len(found) < MAX_EVENTS:
            event = lib.vs_device_next_event(self._device)
            if event == ffi.NULL:
                break
            found.append(self._event(event))
            lib.vs_event_free(event)
        while self._faults:
            found.append(self._faults.popleft())
        return found

    def _event(self, event: Any) -> Event:
        data = bytes(ffi.buffer(event.data, event.len))
        if event.kind == lib.VS_EVENT_MESSAGE:
            self._pending = ffi.new("struct vs_header *", event.header)
            return Message(
                Command(event.header.command),
                event.header.id,
                bool(event.header.flags & HeaderFlag.NO_REPLY),
                data,
                [event.fds[i] for i in range(event.nr_fds)],
                event.header.error,
            )
        if event.kind == lib.VS_EVENT_CONNECTED:
            return Connected(int.from_bytes(data, "little"))
        text = data.decode(errors="replace")
        return Disconnected(text) if event.kind == lib.VS_EVENT_DISCONNECTED else Notice(text)

    def reply(self, payload: bytes = b"", error: int = 0, fds: Sequence[int] = ()) -> None:
        """Answer the one Message that is up; `fds` are duplicated. Harmless if its client has gone."""
        header, self._pending = self._pending, None
        if header is None:
            return
        result = lib.vs_device_reply(self._device, header, payload, len(payload), error, list(fds), len(fds))
        if result != -errno.ENOTCONN:
            check(result)

    def request(self, command: Command, payload: bytes, timeout: float, room: int = MAX_DATA_XFER_SIZE + 16) -> bytes:
        """Send DMA_READ or DMA_WRITE to the client and wait `timeout` seconds for the reply's body.

        Blocks without the GIL: call it from a worker thread, never from a trap (OSError EDEADLK) or a client would wait
        for itself.
        """
        reply = ffi.new("uint8_t[]", room)
        n = check(lib.vs_device_request(self._device, command, payload, len(payload), reply, room, int(timeout * 1000)))
        return bytes(ffi.buffer(reply, n))

    # policy

    def set_class(self, state_class: StateClass) -> None:
        """Switch the answers. Waits, without the GIL, for the access in flight; ranges that become shadowed are
        snapshot then.

        OSError EAGAIN: kept writes must be taken before the device may run again.
        """
        check(lib.vs_device_switch(self._device, state_class))
        self.state_class = state_class

    def take_kept_writes(self) -> list[KeptWrite]:
        """The writes that were kept, oldest first; they are the caller's now."""
        room = 256
        kept = ffi.new("struct vs_kept_write[]", room)
        taken: list[KeptWrite] = []
        while n := int(lib.vs_device_take_kept(self._device, kept, room)):
            taken += [KeptWrite(k.region, k.offset, k.width, k.value) for k in kept[0:n]]
        return taken

    def drop_kept_writes(self) -> int:
        """Forget the kept writes (a reset, a load, a new client); returns how many."""
        return len(self.take_kept_writes())

    def unmaps_to_python(self, up: bool) -> None:
        """While dirty pages are logged, unmaps come up as messages: their bits are collected first."""
        lib.vs_device_dma_to_python(self._device, up)

    def mark_reset(self) -> None:
        """The device was reset: a line in the trace, if there is one."""
        if self._trace is not None:
            self._trace.mark_reset()

    def statistics(self) -> ContextStatistics:
        """Counters since the Context was made."""
        counters = ffi.new("struct vs_counters *")
        counts = ffi.new("uint64_t[]", NUM_ANSWERS * NUM_CLASSES * 2)
        lib.vs_device_counts(self._device, counters, counts)
        accesses = {
            (Answer(i // (NUM_CLASSES * 2)), StateClass(i // 2 % NUM_CLASSES), "write" if i % 2 else "read"): int(n)
            for i, n in enumerate(counts)
            if n
        }
        c = counters
        return ContextStatistics(
            c.messages, c.replies, c.errors, c.notices, c.notices_lost, c.fds_closed, c.connections, accesses
        )

    # traps, in the pump's thread

    def trap(self, write: bool, region: int, offset: int, buffer: Any, count: int) -> int:
        """One trapped access: 0, or a negative errno."""
        target = self._traps
        try:
            if target is None:
                return -errno.ENXIO
            if write and count in (1, 2, 4, 8):
                target.trap_write(region, offset, count, int.from_bytes(ffi.buffer(buffer, count), "little"))
            elif write:
                target.trap_write_block(region, offset, bytes(ffi.buffer(buffer, count)))
            elif count in (1, 2, 4, 8):
                ffi.buffer(buffer, count)[:] = target.trap_read(region, offset, count).to_bytes(count, "little")
            else:
                ffi.buffer(buffer, count)[:] = target.trap_read_block(region, offset, count)
        except VfuServerError as error:
            return -error.errno
        except Exception as error:  # noqa: BLE001 - the border to C: nothing may pass, nothing may be lost
            self._faults.append(Fault(error, f"{'write to' if write else 'read of'} region {region} at {offset:#x}"))
            lib.vs_signal_fd(self._event_fd)
            return -errno.EIO
        return 0


@ffi.def_extern(error=-errno.EIO)  # type: ignore[untyped-decorator]
def vs_trap(handle: Any, write: bool, region: int, offset: int, buffer: Any, count: int) -> int:
    """The door from C for trapped accesses."""
    context: Context = ffi.from_handle(handle)
    return context.trap(write, region, offset, buffer, count)


def close_socket(sock_fd: int) -> None:
    """Close a client's connection so that it sees an end of file and not a reset (which QEMU 11.1 does not survive)."""
    lib.vs_close_socket(sock_fd)
