"""A VF under this plugin's care, migrated by its own registers: the steps of its migration, one after another.

What each step does to the hardware is in files of their own; here is when, and what is remembered in between.
"""

import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Final

from plugins.hns import drain
from plugins.hns.blob import MATCH_SIZE, SIZE, Match
from plugins.hns.drain import AtRest
from plugins.hns.facts import Facts
from plugins.hns.gate import Gate
from plugins.hns.loading import Loading
from plugins.hns.mailbox import Mailbox
from plugins.hns.options import Options
from plugins.hns.pf import PhysicalFunction
from plugins.hns.pf_search import find_pf
from plugins.hns.policy import policy_of, shown_sizes
from plugins.hns.registers import MAILBOX, MAILBOX_SIZE, QM_REGION
from plugins.hns.restore import check_match, write_state
from plugins.hns.save import match_part, read_state
from plugins.hns.self_test import log_registers
from plugins.hns.vft import Queues
from plugins.hns.window import Window
from vfu_server.companion import Companions
from vfu_server.device import (
    Capabilities,
    Device,
    PrecopyInfo,
    SavePhase,
    Section,
    Sink,
    StateIdentity,
    StopKind,
)
from vfu_server.errors import HostError, StateError, StreamFormatError
from vfu_server.host_device import HostDevice
from vfu_server.kernel_migration import SECTION_VERSION, TAG
from vfu_server.pci_command import memory_space
from vfu_server.policy import Policy

log = logging.getLogger(__name__)

TAG_MAILBOX: Final = "mailbox"
"""An optional section: the 16 bytes that the guest is to read of its last command."""
MAILBOX_VERSION: Final = 1


class HnsDevice(Device):
    """One VF. Its sections are those of a kernel driver's state, so either may load what the other has saved."""

    def __init__(self, host: HostDevice, facts: Facts, options: Options) -> None:
        super().__init__(host)
        self._facts = facts
        self._options = options
        self._stack = AsyncExitStack()
        self._pf: PhysicalFunction | None = None
        self._window = Window(host, host)
        self._mailbox = Mailbox(self._window)
        self._pf_ctrl = False
        self._obstacle = facts.obstacle(host.regions[QM_REGION].size)
        self._gate = Gate(host)
        """Shared with the traps: under `lock`."""
        self._rest: AtRest | None = None
        """What `start` has to let go on; None: it runs, or nothing of it was ever at rest."""
        self._restored = False
        self._queues = Queues(0, 0)
        """As the PF has given them: found before any guest is there, since a running guest has the mailbox."""
        self._match_sent = False
        self._own = (self._queues, 0)
        """Queues and isolation, as they were when a load began."""
        self._loading = Loading(self._check)
        self._counts = dict.fromkeys(("stops", "stops_failed", "saves", "restores", "resets", "unused_states"), 0)

    async def open(self, companions: Companions) -> None:
        """Find the PF, and with it the mode. HostError: what was asked for is not there."""
        if self._obstacle:
            return
        pf = await find_pf(self.host, self._facts, self._options, companions, self._stack)
        self._pf = pf
        if pf is None:
            if self._facts.may_have_windows:
                self._obstacle = f"{self._facts.variant} may be migrated through its PF only: --option pf=..."
                return
            log.warning("%s: no PF is known: errors of the device (RAS) are not looked at", self.host.name)
        elif self._facts.may_have_windows and pf.has_windows():
            self._use_window(pf)
        self._queues = await drain.read_queues(self._mailbox)
        if not self._queues.count:
            self._obstacle = "its PF has given it no queues"
        if self._options.self_test:
            log_registers(self._window, self._facts, pf)

    def _use_window(self, pf: PhysicalFunction) -> None:
        if self._options.vf is None:
            raise HostError(f"{self.host.name}: its PF {pf.name} is in mode PF_CTRL: --option vf=N says which VF it is")
        self._pf_ctrl = True
        self._window = pf.window(self.host, self._options.vf)
        self._mailbox = Mailbox(self._window)

    # declarations

    @property
    def identity(self) -> StateIdentity:
        """Kind and generation; what else must be equal is in the state's first 40 bytes."""
        return StateIdentity(self._facts.variant, SECTION_VERSION)

    @property
    def region_sizes(self) -> Mapping[int, int]:
        """Half of BAR2, in mode VF_CTRL."""
        return shown_sizes({region.index: region.size for region in self.host.regions}, pf_ctrl=self._pf_ctrl)

    @property
    def policy(self) -> Policy:
        sizes = {region.index: region.size for region in self.host.regions}
        return policy_of({**sizes, **self.region_sizes})

    @property
    def capabilities(self) -> Capabilities:
        """STOP_COPY and PRE_COPY, as the kernel's driver."""
        if self._obstacle:
            return Capabilities(migratable=False, reason=self._obstacle)
        return Capabilities(pre_copy=True)

    # the guest's mailbox, in the pump's thread

    def trap_read(self, region: int, offset: int, width: int) -> int:
        return int.from_bytes(self.trap_read_block(region, offset, width), "little")

    def trap_write(self, region: int, offset: int, width: int, value: int) -> None:
        self.trap_write_block(region, offset, value.to_bytes(width, "little"))

    def trap_read_block(self, region: int, offset: int, length: int) -> bytes:
        with self.lock:
            return self._gate.read(offset - MAILBOX, length)

    def trap_write_block(self, region: int, offset: int, data: bytes) -> None:
        with self.lock:
            self._gate.write(offset - MAILBOX, data)

    # states

    async def stop(self, kind: StopKind) -> None:
        """Pause the function, once the guest's last mailbox command has ended. It goes on as before if that fails."""
        if kind is StopKind.P2P:
            raise StateError(f"{self.host.name}: P2P is not offered")
        with self.lock:
            self._gate.close()
        try:
            with memory_space(self.host):
                await self._mailbox.idle()
                if self._gate.view is None:
                    self._gate.view = self._window.mailbox_words()
                self._rest = await drain.stop(self._window, self._mailbox, self._pf)
        except BaseException:
            self._counts["stops_failed"] += 1
            with self.lock:
                self._gate.open()
            raise
        self._counts["stops"] += 1

    async def start(self, kind: StopKind) -> None:
        """Restart the queues that were paused, or that a restore has brought; raise pending events after a restore."""
        if self._rest is not None and self._rest.paused:
            with memory_space(self.host):
                await drain.start(self._window, self._mailbox, self._rest, events=self._restored)
        self._rest, self._restored = None, False
        with self.lock:
            self._gate.open()

    async def reset(self) -> None:
        """The function's own reset."""
        await self.host.reset()
        self._rest, self._restored, self._match_sent = None, False, False
        self._loading = Loading(self._check)
        with self.lock:
            self._gate.reset()
        self._counts["resets"] += 1

    # save

    async def estimate(self) -> int:
        """The blob, whether or not its first part has gone."""
        return SIZE + MAILBOX_SIZE

    async def precopy_info(self) -> PrecopyInfo:
        """The match part, until it was given."""
        return PrecopyInfo(initial_bytes=0 if self._match_sent else MATCH_SIZE)

    async def save_begin(self) -> None:
        """Nothing was given yet."""
        self._match_sent = False

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        """PRE_COPY: the match part, so that the other side may refuse before the guest is stopped."""
        if phase is SavePhase.PRE_COPY:
            if not self._match_sent:
                await sink.send(Section(TAG, SECTION_VERSION, self._match().encode()))
                self._match_sent = True
            return
        with memory_space(self.host):
            state = await read_state(self._window, self._mailbox)
        payload = b"" if state is None else state.encode()
        if not self._match_sent:
            payload = self._match(ready=state is not None).encode() + payload
        if payload:
            await sink.send(Section(TAG, SECTION_VERSION, payload))
        if (view := self._gate.view) is not None:
            await sink.send(Section(TAG_MAILBOX, MAILBOX_VERSION, view, optional=True))
        self._counts["saves"] += 1
        self._counts["unused_states"] += state is None

    def _match(self, *, ready: bool = True) -> Match:
        queues = self._queues if self._rest is None else self._rest.queues
        return match_part(self._facts.kind.vf_id, queues, self._isolation(), ready=ready)

    def _isolation(self) -> int:
        """The device's; without a PF the function's own register tells the same."""
        if self._pf is not None:
            return self._pf.isolation()
        with memory_space(self.host):
            return self._window.read("queue_isolation")

    # load

    async def load_begin(self) -> None:
        """Forget an abandoned load, and what the function was at itself: none of it may stay beside the new state.

        What a match part is compared with is read now, while the client waits: later it may write COMMAND at any time.
        """
        self._loading = Loading(self._check)
        if self._rest is not None and self._rest.paused:
            await self.host.reset()
            self._rest = AtRest(self._rest.queues, paused=False)
        with memory_space(self.host):
            self._own = (await drain.read_queues(self._mailbox), self._isolation())

    def knows(self, tag: str, version: int) -> bool:
        return (tag, version) in ((TAG, SECTION_VERSION), (TAG_MAILBOX, MAILBOX_VERSION))

    async def load(self, section: Section) -> None:
        """Keep the bytes; refuse by the match part as soon as it is in."""
        if section.tag == TAG:
            await self._loading.add(section.payload)
        elif len(section.payload) != MAILBOX_SIZE:
            raise StreamFormatError(f"section {TAG_MAILBOX} has {len(section.payload)} bytes, not {MAILBOX_SIZE}")
        else:
            self._loading.mailbox = section.payload

    async def _check(self, match: Match) -> None:
        check_match(match, self._facts.kind.vf_id, *self._own)

    async def load_done(self) -> None:
        """Write the state, if there is any. StreamFormatError, RestoreError."""
        match, state = self._loading.result()
        with memory_space(self.host):
            queues = await drain.read_queues(self._mailbox)
            used = state is not None and state.has_queues
            if state is not None and used:
                await write_state(self._window, self._mailbox, match, state)
        self._counts["unused_states"] += not used
        self._rest, self._restored = AtRest(queues, paused=used), used
        with self.lock:
            self._gate.reset()
            self._gate.close()
            self._gate.view = self._loading.mailbox
        self._loading = Loading(self._check)
        self._counts["restores"] += 1

    def statistics(self) -> Mapping[str, int]:
        """How often it was stopped, saved, restored, reset; how many states were of functions that nobody used."""
        return dict(self._counts)

    async def aclose(self) -> None:
        """Leave the PF to others."""
        await self._stack.aclose()
