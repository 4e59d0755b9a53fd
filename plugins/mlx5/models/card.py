"""The whole card: what a PF and its VFs share, put together, and the life of functions: enabled, reset, torn down.

Each part's rules are in its own module; here is what ties them: whose pages are asked for when, what an event queue
hears, what a reset takes away. It must not know BARs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from plugins.mlx5.models.caps import Capabilities
from plugins.mlx5.models.commands_boot import BootCommands
from plugins.mlx5.models.commands_eswitch import EswitchCommands
from plugins.mlx5.models.commands_migration import MigrationCommands
from plugins.mlx5.models.commands_objects import ObjectCommands
from plugins.mlx5.models.commands_pages import PageCommands
from plugins.mlx5.models.commands_tracker import TrackerCommands
from plugins.mlx5.models.eq import COMMAND, PAGE_REQUEST, VPORT_CHANGE, EventQueues
from plugins.mlx5.models.eswitch import Eswitch
from plugins.mlx5.models.firmware import Firmware, Stage
from plugins.mlx5.models.image import Geometry, Pattern
from plugins.mlx5.models.keys import Keys
from plugins.mlx5.models.migration import Migration
from plugins.mlx5.models.options import Options
from plugins.mlx5.models.orders import Orders
from plugins.mlx5.models.pages import PF, PageBank
from plugins.mlx5.models.queue import CommandQueue
from plugins.mlx5.models.segment import Segment
from plugins.mlx5.models.status import RefusedError, Status, Violations
from plugins.mlx5.models.tracker import Tracker
from plugins.mlx5.models.transport import Transport
from plugins.mlx5.models.vhca import Vhca, fresh_key
from vfu_server.model import Bus

FIRST_VHCA, VHCA_STEP = 0x21, 3
"""VHCA ids are no function numbers, so that a driver that mixes them up is noticed."""
PF_VHCA = 0x1F
FIRST_UAR, LAST_UAR = 0x10, 0xDF
VECTORS = 16
MOST_RECLAIMED = 50000
RELEASE_ALL = 1 << 14


class Card:
    """One card. `pf_bus` is the PF's bus; the functions' own parts are hung in by `functions`."""

    def __init__(self, options: Options, seed: str, pf_bus: Callable[[], Bus]) -> None:
        self.options = options
        self.orders = Orders()
        self.violations = Violations()
        self.guests = Violations("guest_violation")
        """What guests did to their VFs; never the PF driver's fault."""
        self.vectors = VECTORS
        self.stage = Stage.RESET
        self._seed = seed
        self._lives = 0
        self._issi = 0
        self._bus = pf_bus
        self._init_asked = False
        self._uars: set[int] = set()
        self._unsent: list[tuple[int, int]] = []
        self._held: set[int] = set()
        """VFs that have the pages which a SAVE needs."""
        self.segment: Segment | None = None
        self.queue: CommandQueue | None = None
        self.pf_caps = Capabilities(vhca_id=PF_VHCA, vf=False, changes=options.caps)
        self.pages = PageBank(pf_bus, self.violations, self.fail)
        self.keys = Keys(pf_bus)
        self.events = EventQueues(pf_bus, self.orders, self.violations, self.fail)
        self.transport = Transport(pf_bus, self.keys, self.events, self.violations)
        self.tracker = Tracker(self.transport, self.events, self.orders)
        self.eswitch = Eswitch(options.vfs)
        self.migration = Migration(
            options,
            pf_bus,
            self.keys,
            self.orders,
            chunks=lambda: bool(self.pf_caps.get("migration_in_chunks")),
            need_pages=self._need_pages,
            drop_pages=self._drop_pages,
        )
        geometry = Geometry(options.image_size)
        self.vhcas = [self._new_vhca(index, geometry) for index in range(options.vfs)]
        self.firmware = Firmware(lambda: self.stage, self.orders, self.violations)
        for part in (BootCommands, PageCommands, ObjectCommands, MigrationCommands, TrackerCommands, EswitchCommands):
            self.firmware.add(part(self).commands())

    def _new_vhca(self, index: int, geometry: Geometry) -> Vhca:
        vhca_id = FIRST_VHCA + VHCA_STEP * index
        caps = Capabilities(vhca_id=vhca_id, vf=True, changes={})
        vhca = Vhca(index, vhca_id, caps, geometry, Pattern(fresh_key(self._seed, index, 0), geometry))
        self._set_migratable(vhca)
        return vhca

    def _set_migratable(self, vhca: Vhca) -> None:
        for mode in (0, 1):
            vhca.caps.set("migratable", int(self.options.migratable), mode)

    # faults

    def fail(self, syndrome: int) -> None:
        """The PF's health buffer shows an error."""
        if self.segment is not None:
            self.segment.fail(syndrome)

    # resets

    def reset(self) -> None:
        """FLR or DEVICE_RESET of the PF: everything is forgotten, and the VFs are not enabled any more."""
        self.stage = Stage.RESET
        self._issi = 0
        self._init_asked = False
        self.pf_caps.reset()
        for part in (self.tracker, self.transport, self.events, self.keys, self.pages, self.eswitch):
            part.reset()
        self._uars.clear()
        self._unsent.clear()
        self._held.clear()
        for vhca in self.vhcas:
            vhca.enabled = False
            vhca.caps.reset()
            self._set_migratable(vhca)
            self.reset_vhca(vhca)
        if self.queue is not None:
            self.queue.reset()
        if self.segment is not None:
            self.segment.reset()

    def reset_vhca(self, vhca: Vhca) -> None:
        """FLR or DEVICE_RESET of a VF. It stays enabled, and its trackers stay with the PF (model)."""
        self._lives += 1
        vhca.reset(fresh_key(self._seed, vhca.index, self._lives))
        self._drop_pages(vhca)

    # what the boot commands need

    def issi(self) -> int:
        """The interface revision in use."""
        return self._issi

    def set_issi(self, issi: int) -> None:
        """The driver has chosen."""
        self._issi = issi

    def enable(self, function: int) -> None:
        """ENABLE_HCA: of the PF itself, or of a VF, which then asks for its pages."""
        if function == PF:
            if self.stage is not Stage.RESET:
                raise RefusedError(Status.BAD_SYS_STATE, 0x801, "the PF is enabled already")
            self.stage = Stage.ENABLED
            self.pages.of(PF).asked += self.options.boot_pages
            return
        self._want_ready()
        vhca = self._vf(function)
        if vhca.enabled or self.pages.of(function).asked:
            raise RefusedError(Status.BAD_RES_STATE, 0x802, f"VF {vhca.index} is enabled already")

        def given(all_given: bool) -> None:
            # a reset of the VF meanwhile changes nothing; one of the PF has forgotten this callback
            if all_given:
                vhca.enabled = True
                self.pages.visit(function)

        self._ask(function, self.options.vf_pages, given)

    def disable(self, function: int) -> None:
        """DISABLE_HCA: the counterpart."""
        if function == PF:
            if self.stage is not Stage.ENABLED:
                raise RefusedError(Status.BAD_SYS_STATE, 0x803, "the PF was not torn down")
            left = sum(self.pages.count(number) for number in range(len(self.vhcas) + 1))
            if left:
                raise RefusedError(Status.BAD_SYS_STATE, 0x804, f"{left} pages were not taken back")
            self.stage = Stage.RESET
            self._init_asked = False
            self._issi = 0
            self.pf_caps.reset()
            return
        self._want_ready()
        vhca = self._vf(function)
        if not vhca.enabled:
            raise RefusedError(Status.BAD_RES_STATE, 0x805, f"VF {vhca.index} is not enabled")
        vhca.enabled = False
        self._held.discard(vhca.index)
        self.reset_vhca(vhca)
        self.pages.withdraw(function)
        self._release(function, self.pages.count(function), everything=True)

    def ask_for_init(self) -> None:
        """QUERY_PAGES for INIT_HCA: from now on these pages are needed."""
        if not self._init_asked and self.stage is Stage.ENABLED:
            self._init_asked = True
            self.pages.of(PF).asked += self.options.init_pages

    def initialize(self) -> None:
        """INIT_HCA."""
        if self.stage is not Stage.ENABLED:
            raise RefusedError(Status.BAD_SYS_STATE, 0x806, "the PF is initialized already")
        if not self._init_asked or self.pages.of(PF).asked:
            missing = self.pages.of(PF).asked
            raise RefusedError(Status.BAD_SYS_STATE, 0x807, f"{missing} pages are missing, or nobody asked for them")
        self.pages.visit(PF)
        self.stage = Stage.READY

    def tear_down(self, profile: int) -> None:
        """TEARDOWN_HCA: what was not destroyed is counted and gone."""
        for name, count in {
            **self.keys.numbers(),
            **self.transport.numbers(),
            "eqs": len(self.events),
            "uars": len(self._uars),
            "trackers": len(self.tracker),
            **self.eswitch.numbers(),
            "vfs": sum(vhca.enabled for vhca in self.vhcas),
        }.items():
            if count and profile == 0:
                self.violations.note("leak", f"TEARDOWN_HCA with {count} {name}")
        for part in (self.tracker, self.transport, self.events, self.keys, self.eswitch):
            part.reset()
        self._uars.clear()
        self._unsent.clear()
        for vhca in self.vhcas:
            if vhca.enabled:
                vhca.enabled = False
                self.reset_vhca(vhca)
        self.stage = Stage.ENABLED
        self._init_asked = False

    def caps_of(self, function: int, *, by_vhca: bool) -> Capabilities:
        """The capabilities of a function that a command names."""
        if by_vhca and not self.pf_caps.get("function_id_type_vhca_id"):
            raise RefusedError(Status.BAD_PARAM, 0x808, "functions are not named by their VHCA id here")
        if by_vhca:
            return self.pf_caps if function == PF_VHCA else self.vhca(function).caps
        if function == PF:
            return self.pf_caps
        if not self.pf_caps.get("vhca_resource_manager"):
            raise RefusedError(Status.BAD_PARAM, 0x11E, "this PF does not manage others")
        return self._vf(function).caps

    def set_own(self, values: dict[str, int]) -> None:
        """SET_HCA_CAP of the PF's own block; before INIT_HCA only."""
        if self.stage is not Stage.ENABLED:
            raise RefusedError(Status.BAD_SYS_STATE, 0x809, "capabilities are set before INIT_HCA")
        for name, value in values.items():
            self.pf_caps.set(name, value)
        if self.queue is not None and "cmdif_checksum" in values:
            self.queue.checksums = bool(values["cmdif_checksum"])

    # functions and their names

    def vhca(self, vhca_id: int) -> Vhca:
        """The VF with that VHCA id."""
        for vhca in self.vhcas:
            if vhca.vhca_id == vhca_id:
                return vhca
        raise RefusedError(Status.BAD_RES, 0x80A, f"no VF has the VHCA id {vhca_id:#x}")

    def function_named(self, number: int) -> int:
        """The function that page commands call `number`: VHCA ids where the driver has chosen so."""
        if self._names_by_vhca():
            return PF if number in (PF_VHCA, 0) else self.vhca(number).function_id
        return PF if number == PF else self._vf(number).function_id

    def name_of(self, function: int) -> int:
        """Counterpart of `function_named`."""
        if self._names_by_vhca():
            return PF_VHCA if function == PF else self.vhcas[function - 1].vhca_id
        return function

    def is_over(self, function: int) -> bool:
        """Whether a function's driver may take all its pages back."""
        return self.stage is not Stage.READY if function == PF else not self.vhcas[function - 1].enabled

    def _names_by_vhca(self) -> bool:
        return bool(self.pf_caps.get("icm_mng_function_id_mode"))

    def _vf(self, function: int) -> Vhca:
        if not 1 <= function <= len(self.vhcas):
            raise RefusedError(Status.BAD_RES, 0x80B, f"there is no function {function}")
        return self.vhcas[function - 1]

    def _want_ready(self) -> None:
        if self.stage is not Stage.READY:
            raise RefusedError(Status.BAD_SYS_STATE, 0x80C, "the PF is not initialized")

    # doorbell pages

    def allocate_uar(self) -> int:
        """A doorbell page of the BAR."""
        free = next((n for n in range(FIRST_UAR, LAST_UAR + 1) if n not in self._uars), None)
        if free is None:
            raise RefusedError(Status.LIMIT, 0x80D, "there are no doorbell pages left", mistake=False)
        self._uars.add(free)
        return free

    def free_uar(self, number: int) -> None:
        """The page goes; one in use does not."""
        self.check_uar(number)
        if self.events.uses(number) or self.transport.uses(number):
            raise RefusedError(Status.BUSY, 0x80E, f"doorbell page {number} is in use")
        self._uars.discard(number)

    def check_uar(self, number: int) -> None:
        """BAD_RES unless it is the driver's."""
        if number not in self._uars:
            raise RefusedError(Status.BAD_RES, 0x80F, f"doorbell page {number} was not allocated")

    def has_uar(self, number: int) -> bool:
        """Whether doorbells there mean something."""
        return number in self._uars

    # events

    def command_finished(self, entry: int) -> None:
        """An entry was given back: who subscribed is told."""
        self.events.send(COMMAND, (1 << entry).to_bytes(4, "big"))

    def vport_wants(self, number: int, wanted: Mapping[str, Any]) -> None:
        """A function's driver, or its state, wants other frames: who has asked for it is told, once."""
        if self.eswitch.vport(number).want(wanted):
            self.events.send(VPORT_CHANGE, b"\0\0" + number.to_bytes(2, "big"))

    def events_changed(self) -> None:
        """A new event queue: requests that nobody could hear are sent now."""
        unsent, self._unsent = self._unsent, []
        for function, count in unsent:
            self._send_request(function, count)

    def _send_request(self, function: int, count: int, flags: int = 0) -> None:
        data = (
            flags.to_bytes(2, "big")
            + self.name_of(function).to_bytes(2, "big")
            + (count & 0xFFFFFFFF).to_bytes(4, "big")
        )
        if not self.events.send(PAGE_REQUEST, data):
            self._unsent.append((function, count))

    # pages

    def _ask(self, function: int, count: int, then: Callable[[bool], None]) -> None:
        """Ask for pages; `then` when they are there (at once if none are needed)."""
        if self.orders.take("page-starvation"):
            then(False)
            return
        if not count or self.pf_caps.get("page_request_disable"):
            then(True)
            return
        lender = self.pages.of(function)
        lender.asked += count
        lender.waiting.append(then)
        if not self.orders.take("page-stall"):
            self._send_request(function, count)

    def _release(self, function: int, count: int, *, everything: bool = False) -> None:
        """Have pages taken back."""
        if not count:
            return
        if everything and self.pf_caps.get("release_all_pages"):
            self.pages.forget(function)  # before the event: from then on they are the driver's
            self._send_request(function, 0, RELEASE_ALL)
            return
        self.pages.of(function).spare += count
        while count > 0:
            step = min(count, MOST_RECLAIMED)
            self._send_request(function, -step)
            count -= step

    def _need_pages(self, vhca: Vhca, then: Callable[[bool], None]) -> None:
        if vhca.index in self._held:
            self.pages.visit(vhca.function_id)
            then(True)
            return

        def given(all_given: bool) -> None:
            if all_given:
                self._held.add(vhca.index)
                self.pages.visit(vhca.function_id)
            then(all_given)

        self._ask(vhca.function_id, self.options.save_pages, given)

    def _drop_pages(self, vhca: Vhca) -> None:
        if vhca.index in self._held:
            self._held.discard(vhca.index)
            if self.stage is Stage.READY and not self.pf_caps.get("page_request_disable"):
                self._release(vhca.function_id, self.options.save_pages)

    # for tests and people

    def numbers(self) -> dict[str, int]:
        """Everything that is counted."""
        found = {
            **self.violations.numbers(),
            **self.guests.numbers(),
            "stage": int(self.stage),
            "issi": self._issi,
            **self.pages.numbers(),
            **self.keys.numbers(),
            **self.transport.numbers(),
            **self.tracker.numbers(),
            **self.eswitch.numbers(),
            "eqs": len(self.events),
            "uars": len(self._uars),
        }
        for opcode, count in sorted(self.firmware.counts.items()):
            found[f"command[{opcode:#x}]"] = count
        for vhca in self.vhcas:
            found[f"vf[{vhca.index}].enabled"] = int(vhca.enabled)
            found[f"vf[{vhca.index}].initiator_stopped"] = int(vhca.initiator_stopped)
            found[f"vf[{vhca.index}].responder_stopped"] = int(vhca.responder_stopped)
            found[f"vf[{vhca.index}].tracking"] = int(vhca.tracking)
            found[f"vf[{vhca.index}].spoiled"] = int(vhca.spoiled)
        return found
