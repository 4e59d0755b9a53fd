"""A virtual function that is migrated from here, by commands of its physical function; or by nobody, and then why.

It knows the states of a client and which command goes with which; what the commands are is `vhca`'s, what a save or a
load does `saving`'s and `loading`'s. Source: Linux' mlx5-vfio-pci (main.c).
"""

import contextlib
import errno
import logging
from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping

import trio

from plugins.mlx5 import gate, identity, pf, self_test
from plugins.mlx5.commands import Bound
from plugins.mlx5.init_segment import InitSegment
from plugins.mlx5.loading import LoadSession
from plugins.mlx5.options import Options
from plugins.mlx5.pf import PhysicalFunction, VirtualFunction
from plugins.mlx5.policy import msix_table, policy_of
from plugins.mlx5.saving import SaveSession
from plugins.mlx5.status import CommandLostError, PfDeadError
from plugins.mlx5.tracker import PageTracker
from plugins.mlx5.vf_index import index_of, is_address
from plugins.mlx5.vhca import Part, Vhca
from vfu_server.companion import Companions
from vfu_server.device import Capabilities, Device, PrecopyInfo, SavePhase, Section, Sink, StateIdentity, StopKind
from vfu_server.errors import HostError, StateError, StateLostError, VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.kernel_migration import SECTION_VERSION, TAG
from vfu_server.pci_command import memory_space
from vfu_server.policy import Policy
from vfu_server.uapi import PCI_CFG_SPACE_SIZE, RegionIndex

log = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0
READY_SECONDS = 5.0
ONE_PROCESS = "another process holds it, and one process has to serve all virtual functions of a physical function"
WAYS = (
    "It can be migrated in two ways: bind it to mlx5_vfio_pci, whose physical function mlx5_core drives, or give its "
    "physical function to vfio-pci too and name it with --option pf=BDF; both need VF_MIGRATION_MODE=2 in the firmware "
    "(mlxconfig) and the function's `migratable` bit (docs/operators/mlx5.md)"
)


class OwnWay(Device):
    """One function. Until `open` nothing is known of its physical function."""

    def __init__(self, host: HostDevice, options: Options, firmware: str) -> None:
        super().__init__(host)
        self._options = options
        self._firmware = firmware
        self._stack = contextlib.AsyncExitStack()
        self._reason = f"whether {options.pf or 'a physical function'} lets it be migrated shows when it is served"
        self._pf: PhysicalFunction | None = None
        self._function: VirtualFunction | None = None
        self._vhca: Vhca | None = None
        self._identity = identity.driven_identity(firmware, 0, "")
        self._tracker: PageTracker | None = None
        self._generation = 0
        self._stopped: set[Part] = set()
        self._both = False
        """The full stop has stopped the initiator as well, so the start undoes both."""
        self._save: SaveSession | None = None
        self._ending: trio.Event | None = None
        self._load: LoadSession | None = None
        self._counts: Counter[str] = Counter(dict.fromkeys(("suspends", "resumes", "images_saved", "bytes_saved"), 0))
        header = host.read_block(RegionIndex.CONFIG, 0, min(PCI_CFG_SPACE_SIZE, host.regions[RegionIndex.CONFIG].size))
        self._table = msix_table(header)

    # declarations

    @property
    def identity(self) -> StateIdentity:
        return self._identity

    def check_identity(self, identity_: StateIdentity) -> None:
        identity.check(identity_, self._identity)

    @property
    def policy(self) -> Policy:
        return policy_of(self.host.regions, self._table, p2p=self._vhca is not None)

    @property
    def capabilities(self) -> Capabilities:
        """All that the firmware can, or nothing."""
        if self._vhca is None:
            return Capabilities(migratable=False, reason=self._reason)
        return Capabilities(pre_copy=True, p2p=True)

    @property
    def dirty_log(self) -> PageTracker | None:
        """The firmware's log of the pages that the function writes."""
        return self._tracker

    # open and close

    async def open(self, companions: Companions) -> None:
        """Use the physical function, if there is one. Without it the function is presented all the same."""
        if is_address(self.host.name) and not self._options.pf:
            await self._no_way(
                "its kernel driver does not migrate it, and no --option pf=BDF names its physical function"
            )
            return
        where = self._options.pf or "pf"
        try:
            self._pf = await self._stack.enter_async_context(companions.open(where, pf.serve))
            index = index_of(self._pf.host, self.host, self._options.vf)
            self._function = await self._pf.attach(index, self.host.name)
        except VfuServerError as error:
            busy = f"; {ONE_PROCESS}" if error.errno == errno.EBUSY else ""
            await self._no_way(f"physical function {where}: {error}{busy}")
            return
        self._generation = self._pf.generation
        await self._wait_ready()
        if self._options.self_test:
            await self_test.run(self._pf, self._function)
        if self._function.missing:
            names = "; ".join(str(one) for one in self._function.missing)
            await self._no_way(f"physical function {self._pf.host.name} lacks: {names}")
            return
        self._take(self._pf, self._function)

    async def _wait_ready(self) -> None:
        """The firmware enables it once it has got the pages that it asks for by events."""
        try:
            with memory_space(self.host):
                await InitSegment(self.host).wait_initialized(READY_SECONDS)
        except VfuServerError as error:
            log.warning("%s: it is enabled, but not ready: %s", self.host.name, error)

    def _take(self, owner: PhysicalFunction, function: VirtualFunction) -> None:
        adapter = owner.adapter
        features = gate.features(adapter)
        self._vhca = _vhca_of(owner, function)
        self._identity = identity.driven_identity(owner.firmware, features, adapter.psid)
        if gate.can_track_pages(adapter.general, adapter.general_2):
            self._tracker = PageTracker(owner, function)
        log.info(
            "%s: migrated from here, as function %d (vhca %#x) of %s, %s, %s",
            self.host.name,
            function.index,
            function.vhca_id,
            owner.host.name,
            "in chunks" if self._vhca.chunks else "in one image",
            "with the firmware's log of pages" if self._tracker else "without a log of pages",
        )

    async def _no_way(self, why: str) -> None:
        if identity.too_old(self.host):
            self._reason = "no firmware of this family (ConnectX-6 and older) migrates a virtual function"
        else:
            self._reason = f"{why}. {WAYS}"
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of the physical function."""
        owner, function = self._pf, self._function
        if self._save is not None:
            self._ending, self._save = self._save.end(running=self._responds), None
        if self._load is not None:
            self._load.leave()
            self._load = None
        if owner is not None and function is not None:
            with trio.move_on_after(CLOSE_SECONDS):
                if self._ending is not None:
                    await self._ending.wait()
            try:
                await owner.detach(function)
            except HostError as error:
                log.debug("%s: letting go of it: %s", self.host.name, error)
        self._pf = self._function = self._vhca = self._tracker = None
        await self._stack.aclose()

    # states

    def _at_work(self) -> tuple[PhysicalFunction, Vhca]:
        """What a command needs. StateLostError: the physical function was reset under this one."""
        if self._pf is None or self._vhca is None:
            raise StateError(f"it cannot be migrated: {self._reason}")
        if self._pf.generation != self._generation:
            raise StateLostError(f"{self.host.name}: its physical function was reset, and its state is lost")
        return self._pf, self._vhca

    async def stop(self, kind: StopKind) -> None:
        """Initiator first, then the responder. Waits for an image that is being written."""
        _, vhca = self._at_work()
        await self._quiet()
        if kind is StopKind.P2P:
            await self._suspend(vhca, Part.INITIATOR)
            return
        both = Part.INITIATOR not in self._stopped
        await self._suspend(vhca, Part.INITIATOR)
        try:
            await self._suspend(vhca, Part.RESPONDER)
        except HostError as error:
            if both:
                await self._undo(self._resume(vhca, Part.INITIATOR), error)
            raise
        self._both = both

    async def start(self, kind: StopKind) -> None:
        """The responder first, then the initiator."""
        _, vhca = self._at_work()
        if kind is StopKind.P2P:
            await self._resume(vhca, Part.INITIATOR)
            return
        await self._resume(vhca, Part.RESPONDER)
        if self._both:
            try:
                await self._resume(vhca, Part.INITIATOR)
            except HostError as error:
                await self._undo(self._suspend(vhca, Part.RESPONDER), error)
                raise
        self._both = False

    @property
    def _responds(self) -> bool:
        return Part.RESPONDER not in self._stopped

    async def _suspend(self, vhca: Vhca, part: Part) -> None:
        if part not in self._stopped:
            with _told_if_unknown(self.host.name, f"suspending its {part.value}"):
                await vhca.suspend(part)
            self._stopped.add(part)
            self._counts["suspends"] += 1

    async def _resume(self, vhca: Vhca, part: Part) -> None:
        if part in self._stopped:
            with _told_if_unknown(self.host.name, f"resuming its {part.value}"):
                await vhca.resume(part)
            self._stopped.discard(part)
            self._counts["resumes"] += 1

    async def _undo(self, step: Awaitable[None], error: HostError) -> None:
        """Take a half back. If that fails too, nobody knows any more what the function does."""
        try:
            await step
        except HostError as second:
            raise StateLostError(f"{error}; then: {second}", error.errno) from second

    async def _quiet(self) -> None:
        """Until the firmware writes no image of this function."""
        if self._ending is not None:
            await self._ending.wait()
            self._ending = None
        if self._save is not None:
            await self._save.settle()

    async def reset(self) -> None:
        """The function's own reset, which the firmware answers by forgetting suspension and tracking."""
        if self._load is not None:
            self._load.leave()
            self._load = None
        await self.host.reset()
        self._stopped.clear()
        self._both = False
        if self._save is not None:
            self._ending, self._save = self._save.end(running=False), None
        if self._pf is not None and self._function is not None and self._vhca is not None:
            if (failure := self._pf.queue.failure) is not None:
                raise PfDeadError(f"{self.host.name}: {failure}")
            self._generation = self._pf.generation
            self._vhca = _vhca_of(self._pf, self._function)

    # save

    async def estimate(self) -> int:
        _, vhca = self._at_work()
        return (await vhca.query(incremental=False)).size

    async def precopy_info(self) -> PrecopyInfo:
        self._at_work()
        if self._save is None:
            return PrecopyInfo()
        return await self._save.info(running=not self._stopped)

    async def save_begin(self) -> None:
        """QUERY, memory, and for a device that runs the first image, with tracking."""
        owner, vhca = self._at_work()
        await self._quiet()
        save = SaveSession(vhca, owner.memory, owner.beside)
        await save.begin(running=self._responds)
        self._save = save

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        self._at_work()
        if self._save is None:
            raise StateError(f"{self.host.name}: no save has begun")
        if phase is SavePhase.PRE_COPY:
            await self._save.give_early(sink)
        else:
            await self._save.give_rest(sink)

    async def save_end(self) -> None:
        """What is still to be done, such as turning tracking off, goes on beside."""
        if self._save is not None:
            self._counts["images_saved"] += self._save.images
            self._counts["bytes_saved"] += self._save.bytes
            self._ending, self._save = self._save.end(running=self._responds), None

    # load

    async def load_begin(self) -> None:
        owner, vhca = self._at_work()
        if self._load is not None:
            self._load.leave()
            await self._load.ended.wait()
        await self._quiet()
        load = LoadSession(vhca, owner.memory, owner.beside)
        await load.begin()
        self._load = load

    def knows(self, tag: str, version: int) -> bool:
        return tag == TAG and version == SECTION_VERSION

    async def load(self, section: Section) -> None:
        self._at_work()
        await self._loading().take(section.payload)

    async def load_done(self) -> None:
        """Every image was checked by the firmware; it keeps them all or has refused one."""
        self._at_work()
        load = self._loading()
        await load.finish()
        self._load = None
        self._counts["images_loaded"] += load.loaded

    def _loading(self) -> LoadSession:
        if self._load is None:
            raise StateError(f"{self.host.name}: no load has begun")
        return self._load

    def statistics(self) -> Mapping[str, int]:
        """This function's counts and those of its physical function."""
        found = dict(self._counts)
        if self._tracker is not None:
            found |= {"dirty_reports": self._tracker.reports, "dirty_pages": self._tracker.pages}
        if self._pf is not None:
            found |= {f"pf_{name}": count for name, count in self._pf.queue.counts.items()}
            found["pf_pages"] = self._pf.pages.total
            found["pf_recoveries"] = self._pf.generation
        return found


def _vhca_of(owner: PhysicalFunction, function: VirtualFunction) -> Vhca:
    """The commands for the function as it is now: nothing made before a reset of the physical function is named."""
    caps = owner.adapter.general_2
    return Vhca(
        Bound(owner.queue),
        function.vhca_id,
        chunks=bool(caps["migration_in_chunks"]),
        states=bool(caps["migration_state"]),
    )


@contextlib.contextmanager
def _told_if_unknown(name: str, what: str) -> Iterator[None]:
    """A command that did not come back, or as another's, may have acted or not."""
    try:
        yield
    except CommandLostError as error:
        raise StateLostError(f"{name}: {what}: {error}", error.errno) from error
