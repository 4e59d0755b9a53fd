"""The commands by which the PF sets the e-switch up, the way without offloads. The books are `eswitch`'s."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from plugins.mlx5.models.caps import Capabilities
from plugins.mlx5.models.commands_objects import addresses, must
from plugins.mlx5.models.eswitch import (
    AUTO,
    EGRESS_ACL,
    FDB,
    FORWARD,
    INGRESS_ACL,
    MOST_MACS,
    MULTICAST,
    PROMISC,
    UNICAST,
    Entry,
    Eswitch,
    Vport,
)
from plugins.mlx5.models.firmware import Call, Command
from plugins.mlx5.models.layouts import Layout, bits, raw, u32, u64
from plugins.mlx5.models.messages import NUMBER_OUT, PLAIN_OUT, command, output
from plugins.mlx5.models.status import RefusedError, Status

OK = PLAIN_OUT.pack()
DESTINATION = 8
MAC_ENTRY = 8
VPORT = (bits("other_vport", 8, 31), bits("vport_number", 8, 15, 0))
TABLE = (*VPORT, bits("table_type", 0x10, 31, 24))
TABLE_ID = (*TABLE, bits("table_id", 0x14, 23, 0))

CREATE_TABLE = command(
    "CREATE_FLOW_TABLE",
    0x40,
    *TABLE,
    bits("miss_action", 0x18, 27, 24),
    bits("level", 0x18, 23, 16),
    bits("log_size", 0x18, 7, 0),
    bits("miss_table", 0x1C, 23, 0),
)
TABLE_ONLY = command("flow table", 0x40, *TABLE_ID)
CREATE_GROUP = command(
    "CREATE_FLOW_GROUP",
    0x400,
    *TABLE_ID,
    u32("first", 0x1C),
    u32("last", 0x24),
    bits("criteria", 0x3C, 7, 0),
    raw("mac", 0x48, 6),
    bits("port", 0x84, 15, 0),
)
GROUP_ONLY = command("flow group", 0x40, *TABLE_ID, u32("group_id", 0x18))
SET_ENTRY = command(
    "SET_FLOW_TABLE_ENTRY",
    0x340,
    *TABLE_ID,
    bits("modify_mask", 0x18, 7, 0),
    u32("index", 0x20),
    u32("group_id", 0x44),
    bits("action", 0x4C, 15, 0),
    bits("destinations", 0x50, 23, 0),
    raw("mac", 0x88, 6),
    bits("port", 0xC4, 15, 0),
)
ENTRY_ONLY = command("flow table entry", 0x40, *TABLE_ID, u32("index", 0x20))
L2_ENTRY = command("L2 table entry", 0x40, bits("index", 0x14, 23, 0), raw("mac", 0x22, 6))
VPORT_ONLY = command("vport", 0x10, *VPORT)
MODIFY_STATE = command("MODIFY_VPORT_STATE", 0x10, *VPORT, bits("speed", 0xC, 31, 16), bits("admin", 0xC, 7, 4))
STATE_OUT = output(
    "QUERY_VPORT_STATE", 0x10, bits("speed", 0xC, 31, 16), bits("admin", 0xC, 7, 4), bits("state", 0xC, 3, 0)
)
QUERY_NIC = command("QUERY_NIC_VPORT_CONTEXT", 0x10, *VPORT, bits("list", 0xC, 26, 24))
NIC_OUT = output(
    "QUERY_NIC_VPORT_CONTEXT", 0x110, bits("promisc", 0x100, 31, 29), bits("size", 0x100, 15, 0), raw("mac", 0x106, 6)
)
MODIFY_NIC = command(
    "MODIFY_NIC_VPORT_CONTEXT",
    0x200,
    *VPORT,
    bits("select_guid", 0xC, 9),
    bits("select_event", 0xC, 5),
    bits("select_mac", 0xC, 3),
    bits("arm", 0x104, 31),
    bits("on_promisc", 0x104, 3),
    bits("on_multicast", 0x104, 1),
    bits("on_unicast", 0x104, 0),
    u64("guid", 0x138),
    raw("mac", 0x1F6, 6),
)
MODIFY_OWN = command(
    "MODIFY_NIC_VPORT_CONTEXT",
    0x200,
    *VPORT,
    bits("select_promisc", 0xC, 4),
    bits("select_list", 0xC, 2),
    bits("promisc", 0x1F0, 31, 29),
    bits("list_type", 0x1F0, 26, 24),
    bits("list_size", 0x1F0, 11, 0),
)
"""As the function whose vport it is sends it: with the list of one kind behind it."""
MODIFY_ESW = command(
    "MODIFY_ESW_VPORT_CONTEXT",
    0x110,
    *VPORT,
    bits("select_insert", 0xC, 3),
    bits("select_strip", 0xC, 1),
    raw("context", 0x10, 0x100),
)
ESW_OUT = Layout("QUERY_ESW_VPORT_CONTEXT", 0x110, u64("head", 0), raw("context", 0x10, 0x100))
ALL_CRITERIA = 3


class Switch(Protocol):
    """What the commands need of the card."""

    pf_caps: Capabilities
    eswitch: Eswitch


class EswitchCommands:
    """The PF's."""

    def __init__(self, card: Switch) -> None:
        self._card = card

    def commands(self) -> Iterable[Command]:
        """All of them."""
        both = frozenset({0, 1})
        return (
            Command(0x930, CREATE_TABLE, self._create_table),
            Command(0x931, TABLE_ONLY, self._destroy_table),
            Command(0x92F, TABLE_ONLY, self._set_root, op_mods=both),
            Command(0x933, CREATE_GROUP, self._create_group),
            Command(0x934, GROUP_ONLY, self._destroy_group),
            Command(0x936, SET_ENTRY, self._set_entry, op_mods=both, element=DESTINATION),
            Command(0x938, ENTRY_ONLY, self._delete_entry),
            Command(0x829, L2_ENTRY, self._set_mac),
            Command(0x82B, L2_ENTRY, self._delete_mac),
            Command(0x750, VPORT_ONLY, self._query_state, op_mods=both),
            Command(0x751, MODIFY_STATE, self._modify_state, op_mods=both),
            Command(0x754, QUERY_NIC, self._query_nic, out=0x110),
            Command(0x755, MODIFY_NIC, self._modify_nic),
            Command(0x752, VPORT_ONLY, self._query_esw, out=0x110),
            Command(0x753, MODIFY_ESW, self._modify_esw),
        )

    # flow tables

    def _tables(self, call: Call) -> tuple[Eswitch, int]:
        """The books and the table's type, for commands that only an e-switch manager may send."""
        caps = self._card.pf_caps
        if not caps.get("eswitch_manager") or not caps.get("ft_support"):
            raise RefusedError(Status.BAD_OP, 0x921, "this PF does not manage the e-switch")
        kind = call.values["table_type"]
        must(kind in (EGRESS_ACL, INGRESS_ACL, FDB), 0x922, f"there are no tables of type {kind}")
        must(kind != FDB or not call.values["other_vport"], 0x923, "the FDB belongs to no vport")
        return self._card.eswitch, kind

    def _create_table(self, call: Call) -> bytes:
        v, caps = call.values, self._card.pf_caps
        switch, kind = self._tables(call)
        must(v["log_size"] <= caps.get("log_max_ft_size"), 0x924, f"a table of 2^{v['log_size']} entries")
        must(v["level"] <= caps.get("max_ft_level"), 0x925, f"a table of level {v['level']}")
        must(v["miss_action"] <= 1 and (v["miss_action"] == 1 or not v["miss_table"]), 0x926, "what a miss does")
        miss = v["miss_table"] if v["miss_action"] else None
        return NUMBER_OUT.pack(number=switch.create_table(kind, v["level"], v["log_size"], miss))

    def _destroy_table(self, call: Call) -> bytes:
        switch, kind = self._tables(call)
        switch.destroy_table(kind, call.values["table_id"])
        return OK

    def _set_root(self, call: Call) -> bytes:
        switch, kind = self._tables(call)
        must(bool(self._card.pf_caps.get("modify_root")), 0x927, "the root cannot be changed")
        switch.set_root(kind, None if call.op_mod else call.values["table_id"])
        return OK

    def _create_group(self, call: Call) -> bytes:
        v = call.values
        switch, kind = self._tables(call)
        must(not v["criteria"] & ~ALL_CRITERIA, 0x928, f"criteria {v['criteria']:#x}")
        must(not v["mac"] or bool(v["criteria"] & 1), 0x929, "a mask of MACs without its criterion")
        must(not v["port"] or bool(v["criteria"] & 2), 0x92A, "a mask of source ports without its criterion")
        number = switch.create_group(kind, v["table_id"], v["first"], v["last"], v["criteria"], v["mac"], v["port"])
        return NUMBER_OUT.pack(number=number)

    def _destroy_group(self, call: Call) -> bytes:
        switch, kind = self._tables(call)
        switch.destroy_group(kind, call.values["table_id"], call.values["group_id"])
        return OK

    def _set_entry(self, call: Call) -> bytes:
        v = call.values
        switch, kind = self._tables(call)
        must(v["action"] in (1, 2, FORWARD), 0x92B, f"action {v['action']:#x}")
        count = v["destinations"]
        must(count == len(call.tail) // DESTINATION, 0x92C, f"{count} destinations in {len(call.tail)} bytes")
        must((count > 0) is (v["action"] == FORWARD), 0x92D, "destinations without forwarding, or the other way round")
        must(bool(v["modify_mask"]) is (call.op_mod == 1), 0x92E, "what is modified is for modifying")
        ways = []
        for number in addresses(call.tail):
            must(not number & 0xFFFFFFFF, 0x92F, "a destination with ones in its second dword")
            ways.append((number >> 56, number >> 32 & 0xFFFFFF))
        entry = Entry(v["group_id"], v["action"], v["mac"], v["port"], tuple(ways))
        switch.set_entry(kind, v["table_id"], v["index"], entry, modify=call.op_mod == 1)
        return OK

    def _delete_entry(self, call: Call) -> bytes:
        switch, kind = self._tables(call)
        switch.delete_entry(kind, call.values["table_id"], call.values["index"])
        return OK

    def _set_mac(self, call: Call) -> bytes:
        self._check_l2(call)
        mac = call.values["mac"]
        must(bool(mac) and not mac >> 40 & 1, 0x931, f"{mac:012x} is no unicast MAC")
        self._card.eswitch.set_mac(call.values["index"], mac)
        return OK

    def _delete_mac(self, call: Call) -> bytes:
        self._check_l2(call)
        self._card.eswitch.set_mac(call.values["index"], None)
        return OK

    def _check_l2(self, call: Call) -> None:
        index, log = call.values["index"], self._card.pf_caps.get("log_max_l2_table")
        if index >= 1 << log:
            raise RefusedError(Status.BAD_INDEX, 0x932, f"entry {index} of 2^{log} MACs")

    # vports

    def _vport(self, call: Call) -> Vport:
        other, number = call.values["other_vport"], call.values["vport_number"]
        must(bool(other) or not number, 0x941, "the PF's own vport has the number 0")
        if other and not self._card.pf_caps.get("vport_group_manager"):
            raise RefusedError(Status.BAD_OP, 0x942, "this PF does not manage other vports")
        return self._card.eswitch.vport(number)

    def _query_state(self, call: Call) -> bytes:
        port = self._vport(call)
        return STATE_OUT.pack(speed=port.speed, admin=port.admin, state=int(port.admin != 0))

    def _modify_state(self, call: Call) -> bytes:
        port = self._vport(call)
        must(call.values["admin"] <= AUTO, 0x943, f"a vport cannot be in state {call.values['admin']}")
        port.admin, port.speed = call.values["admin"], call.values["speed"]
        return OK

    def _query_nic(self, call: Call) -> bytes:
        return _nic_context(self._vport(call), call)

    def _modify_nic(self, call: Call) -> bytes:
        v, port = call.values, self._vport(call)
        must(bool(v["select_guid"]) or not v["guid"], 0x944, "a GUID that is not selected")
        must(bool(v["select_mac"]) or not v["mac"], 0x945, "a MAC that is not selected")
        events = (v["arm"], v["on_promisc"], v["on_multicast"], v["on_unicast"])
        must(bool(v["select_event"]) or not any(events), 0x946, "events that are not selected")
        if v["select_guid"]:
            port.guid = v["guid"]
        if v["select_mac"]:
            port.mac = v["mac"]
        if v["select_event"]:
            kinds = v["on_unicast"] << UNICAST | v["on_multicast"] << MULTICAST | v["on_promisc"] << PROMISC
            port.armed = kinds if v["arm"] else 0
        return OK

    def _query_esw(self, call: Call) -> bytes:
        return ESW_OUT.pack(context=self._vport(call).vlan)

    def _modify_esw(self, call: Call) -> bytes:
        v, port = call.values, self._vport(call)
        needed = {"select_insert": "vport_cvlan_insert", "select_strip": "vport_cvlan_strip"}
        for select, cap in needed.items():
            must(not v[select] or bool(self._card.pf_caps.get(cap)), 0x947, f"{select} without the capability")
        port.vlan = v["context"]
        return OK


class OwnVportCommands:
    """A VF's, about its own vport: `port` is that, `wanted` is called with what it is to be from now on."""

    def __init__(self, port: Callable[[], Vport], want: Callable[[Mapping[str, Any]], None]) -> None:
        self._port = port
        self._want = want

    def commands(self) -> Iterable[Command]:
        """All of them."""
        return (
            Command(0x754, QUERY_NIC, self._query, out=0x110),
            Command(0x755, MODIFY_OWN, self._modify, element=MAC_ENTRY),
        )

    def _query(self, call: Call) -> bytes:
        self._check_own(call)
        return _nic_context(self._port(), call)

    def _modify(self, call: Call) -> bytes:
        v = call.values
        self._check_own(call)
        must(bool(v["select_promisc"]) or not v["promisc"], 0x949, "a mode that is not selected")
        must(bool(v["select_list"]) or not (v["list_type"] or v["list_size"]), 0x94A, "a list that is not selected")
        must(v["list_size"] == len(call.tail) // MAC_ENTRY, 0x94B, f"{len(call.tail)} bytes of {v['list_size']} MACs")
        must(v["list_type"] in (UNICAST, MULTICAST), 0x94C, f"there is no list of type {v['list_type']}")
        must(v["list_size"] <= MOST_MACS, 0x94D, f"{v['list_size']} MACs")
        wanted = self._port().wanted()
        if v["select_promisc"]:
            wanted["promisc"] = v["promisc"]
        if v["select_list"]:
            macs = addresses(call.tail)
            must(not any(mac >> 48 for mac in macs), 0x94E, "ones beside a MAC")
            must(all(mac >> 40 & 1 == v["list_type"] for mac in macs), 0x94F, "a MAC in the other list")
            wanted["lists"][str(v["list_type"])] = list(macs)
        self._want(wanted)
        return OK

    @staticmethod
    def _check_own(call: Call) -> None:
        if call.values["other_vport"] or call.values["vport_number"]:
            raise RefusedError(Status.BAD_PARAM, 0x948, "a VF sees its own vport only")


def _nic_context(port: Vport, call: Call) -> bytes:
    """What a vport's own driver wants, and one of its lists, as far as there is room for it."""
    macs = port.macs(call.values["list"])
    call.want_room(0x110)
    room = (call.room - 0x110) // MAC_ENTRY
    head = NIC_OUT.pack(size=min(len(macs), room), mac=port.mac, promisc=port.promisc)
    return head + b"".join(mac.to_bytes(MAC_ENTRY, "big") for mac in macs[:room])
