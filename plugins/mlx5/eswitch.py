"""The way of the virtual functions' frames: one forwarding table by destination address, as Linux' legacy mode has it.

It knows nothing of migration, which does not need it. What firmware does with a table that is laid out otherwise than
here is not known; the README says what was verified. Source: Linux' mlx5_core (eswitch.c, esw/legacy.c).
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from plugins.mlx5.boot import query_caps
from plugins.mlx5.commands import Commands
from plugins.mlx5.contexts import CAP_ESWITCH, CAP_ESWITCH_FLOW_TABLE, EQE_VPORT, ESWITCH, ESWITCH_FLOW_TABLE, GENERAL
from plugins.mlx5.layouts import (
    CREATE_FLOW_GROUP,
    CREATE_FLOW_TABLE,
    DELETE_FLOW_TABLE_ENTRY,
    DELETE_L2_TABLE_ENTRY,
    DESTROY_FLOW_GROUP,
    DESTROY_FLOW_TABLE,
    MODIFY_ESW_VPORT_CONTEXT,
    MODIFY_NIC_VPORT_CONTEXT,
    MODIFY_VPORT_STATE,
    QUERY_NIC_VPORT_CONTEXT,
    QUERY_VPORT_STATE,
    SET_FLOW_TABLE_ENTRY,
    SET_FLOW_TABLE_ROOT,
    SET_L2_TABLE_ENTRY,
)
from vfu_server.errors import VfuServerError

log = logging.getLogger(__name__)

FDB: Final = 4
LOG_SIZE: Final = 7
UPLINK: Final = 0xFFFF
OUTER: Final = 1
FORWARD: Final = 4
ALL_ONES_MAC: Final = (1 << 48) - 1
MULTICAST_BIT: Final = 1 << 40
UNICAST, MULTICAST = 0, 1
MODIFY_DESTINATIONS: Final = 4
ADMIN_AUTO: Final = 2
ESW_VPORT: Final = 1
MAX_MACS: Final = 1024


@dataclass
class _Port:
    """What one vport has asked for."""

    unicast: set[int] = field(default_factory=set)
    multicast: set[int] = field(default_factory=set)


class Eswitch:
    """The table and its rules. Vport 0 is the physical function's own, n + 1 that of virtual function n."""

    def __init__(self, queue: Commands, l2_entries: int) -> None:
        self._queue = queue
        self._table: int | None = None
        self._groups: list[int] = []
        self._ports: dict[int, _Port] = {}
        self._rules: dict[int, tuple[int, tuple[int, ...]]] = {}
        """By address: the rule's place and its destinations."""
        self._places = list(range((1 << LOG_SIZE) - 3, -1, -1))
        self._l2: dict[int, int] = {}
        self._l2_free = list(range(min(l2_entries, MAX_MACS) - 1, -1, -1))
        self._vlan = 0

    @staticmethod
    async def offered(queue: Commands, general: bytes) -> bool:
        """Whether this function rules its e-switch; on a BlueField its own processor may."""
        if not (GENERAL.get(general, "eswitch_manager") and GENERAL.get(general, "vport_group_manager")):
            return False
        caps = await query_caps(queue, CAP_ESWITCH_FLOW_TABLE, ESWITCH_FLOW_TABLE)
        return bool(caps["ft_support"]) and caps["log_max_ft_size"] >= LOG_SIZE

    async def open(self) -> None:
        """The table with its groups: exact addresses, and all multicast. The way by source port is left out: it is for
        promiscuous functions, and none is trusted so far.
        """
        answer = await self._queue.call(CREATE_FLOW_TABLE, table_type=FDB, level=0, log_size=LOG_SIZE)
        self._table = answer["table_id"]
        await self._queue.call(SET_FLOW_TABLE_ROOT, table_type=FDB, table_id=self._table)
        last = (1 << LOG_SIZE) - 1
        for first, end, dmac, criteria in (
            (0, last - 2, ALL_ONES_MAC, OUTER),
            (last - 1, last - 1, MULTICAST_BIT, OUTER),
        ):
            answer = await self._queue.call(
                CREATE_FLOW_GROUP,
                table_type=FDB,
                table_id=self._table,
                start_flow_index=first,
                end_flow_index=end,
                match_criteria_enable=criteria,
                dmac=dmac,
            )
            self._groups.append(answer["group_id"])
        caps = await query_caps(self._queue, CAP_ESWITCH, ESWITCH)
        self._vlan = caps["vport_cvlan_insert"] & caps["vport_cvlan_strip"]
        await self.add(0)

    async def close(self) -> None:
        """Take all away again."""
        if self._table is None:
            return
        for port in list(self._ports):
            await self.remove(port)
        table, self._table = self._table, None
        await self._queue.call(SET_FLOW_TABLE_ROOT, op_mod=1, table_type=FDB, table_id=table)
        for group in self._groups:
            await self._queue.call(DESTROY_FLOW_GROUP, table_type=FDB, table_id=table, group_id=group)
        self._groups = []
        await self._queue.call(DESTROY_FLOW_TABLE, table_type=FDB, table_id=table)

    async def add(self, port: int) -> None:
        """Let a vport take part; a virtual function's follows the link."""
        self._ports[port] = _Port()
        if port:
            speed = (await self._queue.call(QUERY_VPORT_STATE, _other(port), op_mod=ESW_VPORT))["max_tx_speed"]
            await self._queue.call(
                MODIFY_VPORT_STATE, _other(port), op_mod=ESW_VPORT, admin_state=ADMIN_AUTO, max_tx_speed=speed
            )
            if self._vlan:
                await self._queue.call(
                    MODIFY_ESW_VPORT_CONTEXT, _other(port), select_vport_cvlan_insert=1, select_vport_cvlan_strip=1
                )
        await self.refresh(port)

    async def remove(self, port: int) -> None:
        """Take its rules away."""
        del self._ports[port]
        await self._apply()

    async def on_change(self, event: bytes) -> None:
        """A vport's lists have changed. A failure is logged: nobody waits for it."""
        port = EQE_VPORT.get(event, "vport")
        if port in self._ports:
            try:
                await self.refresh(port)
            except VfuServerError as error:
                log.warning("%s: addresses of vport %d: %s", self._queue.name, port, error)

    async def refresh(self, port: int) -> None:
        """Read what a vport wants to receive, make the rules follow, and ask to be told of the next change."""
        wanted = self._ports[port]
        permanent, unicast = await self._list(port, UNICAST)
        _, wanted.multicast = await self._list(port, MULTICAST)
        wanted.unicast = unicast | ({permanent} if permanent else set())
        await self._apply()
        await self._queue.call(
            MODIFY_NIC_VPORT_CONTEXT,
            _other(port),
            select_change_event=1,
            arm_change_event=1,
            event_on_promisc_change=1,
            event_on_mc_change=1,
            event_on_uc_change=1,
        )

    async def _list(self, port: int, kind: int) -> tuple[int, set[int]]:
        answer = await self._queue.call(
            QUERY_NIC_VPORT_CONTEXT, _other(port), allowed_list_type=kind, room=8 * MAX_MACS
        )
        count = min(answer["allowed_list_size"], MAX_MACS)
        macs = {int.from_bytes(answer.tail[8 * at + 2 : 8 * at + 8], "big") for at in range(count)}
        return answer["permanent_address"], macs - {0}

    async def _apply(self) -> None:
        """Make rules and the list of the wire's addresses what the vports want."""
        wanted: dict[int, list[int]] = {}
        for number, port in sorted(self._ports.items()):
            for mac in port.unicast:
                wanted.setdefault(mac, [number])  # the first has it
            for mac in port.multicast:
                wanted.setdefault(mac, [UPLINK]).append(number)
        for mac in [mac for mac in self._rules if mac not in wanted]:
            await self._delete(mac)
        for mac, ports in wanted.items():
            await self._set(mac, tuple(sorted(ports)))

    async def _set(self, mac: int, ports: tuple[int, ...]) -> None:
        before = self._rules.get(mac)
        if before is not None and before[1] == ports:
            return
        if before is None and not self._places:
            log.warning("%s: no room for another address in the e-switch", self._queue.name)
            return
        assert self._table is not None
        place = before[0] if before else self._places.pop()
        await self._queue.call(
            SET_FLOW_TABLE_ENTRY,
            op_mod=int(before is not None),
            tail=_destinations(ports),
            modify_enable_mask=MODIFY_DESTINATIONS if before else 0,
            table_type=FDB,
            table_id=self._table,
            flow_index=place,
            group_id=self._groups[0],
            action=FORWARD,
            destination_list_size=len(ports),
            dmac=mac,
        )
        self._rules[mac] = (place, ports)
        if not mac & MULTICAST_BIT and mac not in self._l2 and self._l2_free:
            index = self._l2_free.pop()
            await self._queue.call(SET_L2_TABLE_ENTRY, table_index=index, mac=mac)
            self._l2[mac] = index

    async def _delete(self, mac: int) -> None:
        assert self._table is not None
        place, _ = self._rules.pop(mac)
        self._places.append(place)
        await self._queue.call(DELETE_FLOW_TABLE_ENTRY, table_type=FDB, table_id=self._table, flow_index=place)
        if mac in self._l2:
            index = self._l2.pop(mac)
            self._l2_free.append(index)
            await self._queue.call(DELETE_L2_TABLE_ENTRY, table_index=index)


def _other(port: int) -> dict[str, int]:
    return {"other_vport": int(port > 0), "vport_number": port}


def _destinations(ports: Iterable[int]) -> bytes:
    return b"".join((0 << 24 | port).to_bytes(4, "big") + bytes(4) for port in ports)
