"""The general object commands, for the one type there is: page trackers. The trackers themselves are `tracker`'s."""

from collections.abc import Iterable
from typing import Protocol

from plugins.mlx5.models import messages
from plugins.mlx5.models.caps import PAGE_TRACK_TYPE, Capabilities
from plugins.mlx5.models.commands_objects import must
from plugins.mlx5.models.firmware import Call, Command
from plugins.mlx5.models.status import RefusedError, Status
from plugins.mlx5.models.tracker import Tracker
from plugins.mlx5.models.vhca import Vhca

RANGE = 16
MODIFIED = 3
OBJECTS = frozenset({PAGE_TRACK_TYPE})


class Trackers(Protocol):
    """What the commands need of the card."""

    pf_caps: Capabilities
    tracker: Tracker

    def vhca(self, vhca_id: int) -> Vhca: ...


class TrackerCommands:
    """The PF's."""

    def __init__(self, card: Trackers) -> None:
        self._card = card

    def commands(self) -> Iterable[Command]:
        """All of them. The object's type stands where other commands have their op_mod."""
        return (
            Command(0xA00, messages.CREATE_PAGE_TRACK, self._create, op_mods=OBJECTS, element=RANGE),
            Command(0xA01, messages.MODIFY_PAGE_TRACK, self._modify, op_mods=OBJECTS),
            Command(0xA02, messages.OBJECT_ONLY, self._query, op_mods=OBJECTS, out=0x40),
            Command(0xA03, messages.OBJECT_ONLY, self._destroy, op_mods=OBJECTS),
        )

    def _create(self, call: Call) -> bytes:
        v, caps = call.values, self._card.pf_caps
        if not caps.get("adv_virtualization"):
            raise RefusedError(Status.BAD_OP, 0x711, "this card tracks no pages")
        must(not v["vhca_tunnel_id"] and not v["obj_id"] and not v["modify_field_select"], 0x712, "a number of ours")
        must(v["state"] == 0 and v["track_type"] == 1, 0x713, f"state {v['state']}, type {v['track_type']}")
        must(not v["range_start_address"] and not v["range_length"], 0x714, "a range to report in a new tracker")
        ranges = tuple(
            (int.from_bytes(call.tail[at : at + 8], "big"), int.from_bytes(call.tail[at + 8 : at + RANGE], "big"))
            for at in range(0, len(call.tail), RANGE)
        )
        must(0 < len(ranges) == v["num_ranges"] <= caps.get("pg_track_max_num_range"), 0x715, f"{len(ranges)} ranges")
        low, high = caps.get("pg_track_log_min_page_size"), caps.get("pg_track_log_max_page_size")
        must(low <= v["log_page_size"] <= high, 0x716, f"pages of 2^{v['log_page_size']} bytes")
        low, high = caps.get("pg_track_log_min_msg_size"), caps.get("pg_track_log_max_msg_size")
        must(low <= v["log_msg_size"] <= high, 0x717, f"messages of 2^{v['log_msg_size']} bytes")
        low, high = caps.get("pg_track_log_min_addr_space"), caps.get("pg_track_log_max_addr_space")
        must(low <= v["log_addr_space_size"] <= high, 0x718, f"2^{v['log_addr_space_size']} bytes of addresses")
        total = sum(length for _, length in ranges)
        must(all(length for _, length in ranges), 0x719, "an empty range")
        must(
            total <= 1 << v["log_addr_space_size"],
            0x71A,
            f"{total:#x} bytes in a space of 2^{v['log_addr_space_size']}",
        )
        if len(self._card.tracker) >= 1 << caps.get("pg_track_log_max_num"):
            raise RefusedError(Status.LIMIT, 0x71B, "there are as many trackers as there can be")
        vhca = self._card.vhca(v["vhca_id"])
        number = self._card.tracker.create(
            vhca.vhca_id, v["log_page_size"], v["log_addr_space_size"], v["log_msg_size"], v["reporting_qpn"], ranges
        )
        return messages.OBJECT_OUT.pack(obj_id=number)

    def _modify(self, call: Call) -> bytes:
        v = call.values
        must(v["modify_field_select"] == MODIFIED and v["state"] == 1, 0x71C, "not the order to report")
        known = {"opcode", "op_mod", "obj_id", "modify_field_select", "state", "range_start_address", "range_length"}
        others = sorted(name for name, value in v.items() if value and name not in known)
        must(not others, 0x71D, f"the order to report has no {', '.join(others)}")
        self._card.tracker.report(v["obj_id"], v["range_start_address"], v["range_length"])
        return messages.OBJECT_OUT.pack(obj_id=v["obj_id"])

    def _query(self, call: Call) -> bytes:
        track = self._card.tracker.get(call.values["obj_id"])
        return messages.QUERY_PAGE_TRACK_OUT.pack(
            obj_id=track.number,
            vhca_id=track.vhca_id,
            state=track.state,
            track_type=1,
            log_addr_space_size=track.log_addr_space,
            log_page_size=track.log_page_size,
            log_msg_size=track.log_msg_size,
            reporting_qpn=track.qpn,
            num_ranges=len(track.ranges),
        )

    def _destroy(self, call: Call) -> bytes:
        self._card.tracker.destroy(call.values["obj_id"])
        return messages.OBJECT_OUT.pack(obj_id=call.values["obj_id"])
