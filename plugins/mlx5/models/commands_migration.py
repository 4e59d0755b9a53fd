"""The commands that suspend, resume, save and load a VF. What they do is `migration`'s."""

from collections.abc import Iterable
from typing import Protocol

from plugins.mlx5.models import messages
from plugins.mlx5.models.caps import Capabilities
from plugins.mlx5.models.firmware import Call, Command
from plugins.mlx5.models.messages import PLAIN_OUT
from plugins.mlx5.models.migration import Done, Migration
from plugins.mlx5.models.status import RefusedError, Status, Violations
from plugins.mlx5.models.vhca import Vhca

OK = PLAIN_OUT.pack()


class Vhcas(Protocol):
    """What the commands need of the card."""

    pf_caps: Capabilities
    migration: Migration
    violations: Violations

    def vhca(self, vhca_id: int) -> Vhca: ...


class MigrationCommands:
    """The PF's, for all its VFs."""

    def __init__(self, card: Vhcas) -> None:
        self._card = card

    def commands(self) -> Iterable[Command]:
        """All of them."""
        both = frozenset({0, 1})
        return (
            Command(0x115, messages.SUSPEND_VHCA, self._suspend, op_mods=both),
            Command(0x116, messages.RESUME_VHCA, self._resume, op_mods=both),
            Command(0x117, messages.QUERY_MIGRATION, self._query, out=0x40),
            Command(0x118, messages.SAVE_VHCA_STATE, self._save),
            Command(0x119, messages.LOAD_VHCA_STATE, self._load),
        )

    def _vhca(self, call: Call) -> Vhca:
        """The VF that is named. It has to be enabled and migratable, and the card able to migrate."""
        vhca = self._card.vhca(call.values["vhca_id"])
        if not self._card.pf_caps.get("migration"):
            raise RefusedError(Status.BAD_OP, 0x521, "this card migrates nothing")
        if not vhca.enabled:
            raise RefusedError(Status.BAD_RES_STATE, 0x522, f"VHCA {vhca.vhca_id:#x} is not enabled")
        if not vhca.caps.get("migratable", 0):
            raise RefusedError(Status.BAD_RES_STATE, 0x523, f"VHCA {vhca.vhca_id:#x} is not migratable")
        return vhca

    def _suspend(self, call: Call) -> bytes | None:
        self._card.migration.suspend(self._vhca(call), responder=call.op_mod == 1, done=lambda: call.answer(OK))
        return None

    def _resume(self, call: Call) -> bytes:
        self._card.migration.resume(self._vhca(call), initiator=call.op_mod == 1)
        return OK

    def _query(self, call: Call) -> bytes:
        values, caps = call.values, self._card.pf_caps
        if values["incremental"] and not caps.get("migration_tracking_state"):
            raise RefusedError(Status.BAD_PARAM, 0x524, "this card tracks no changes")
        if caps.get("migration_in_chunks") and not values["chunk"]:
            self._card.violations.note("chunk", "a QUERY without chunk on a card that has chunks")
        sizes = self._card.migration.query(
            self._vhca(call), incremental=bool(values["incremental"]), chunk=bool(values["chunk"])
        )
        return messages.QUERY_MIGRATION_OUT.pack(
            migration_state=sizes.state if caps.get("migration_state") else 0,
            required_umem_size=sizes.required,
            remaining_total_size=sizes.remaining,
        )

    def _save(self, call: Call) -> None:
        values = call.values
        tracks = self._card.pf_caps.get("migration_tracking_state")
        if values["set_track"] and not tracks:
            raise RefusedError(Status.BAD_PARAM, 0x524, "this card tracks no changes")
        self._card.migration.save(
            self._vhca(call),
            incremental=bool(values["incremental"]),
            track=bool(values["set_track"]),
            mkey=values["mkey"],
            at=values["va"],
            size=values["size"],
            done=_saved(call),
        )

    def _load(self, call: Call) -> None:
        values = call.values
        vhca = self._vhca(call)
        if vhca.reader is not None and not self._card.pf_caps.get("migration_multi_load"):
            raise RefusedError(Status.BAD_RES_STATE, 0x525, "this card loads one image only")
        self._card.migration.load(vhca, mkey=values["mkey"], at=values["va"], size=values["size"], done=_loaded(call))


def _saved(call: Call) -> Done:
    def done(result: tuple[int, int] | RefusedError) -> None:
        if isinstance(result, RefusedError):
            call.answer(result)
            return
        size, following = result
        call.answer(messages.SAVE_VHCA_STATE_OUT.pack(actual_image_size=size, next_required_umem_size=following))

    return done


def _loaded(call: Call) -> Done:
    def done(result: tuple[int, int] | RefusedError) -> None:
        call.answer(result if isinstance(result, RefusedError) else OK)

    return done
