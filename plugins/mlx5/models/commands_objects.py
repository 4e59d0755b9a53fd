"""Commands that make and unmake what others build on: UAR pages, protection domains, keys, queues, queue pairs.

It checks forms and ranges; the objects themselves are `keys`', `eq`'s and `transport`'s.
"""

from collections.abc import Iterable
from typing import Protocol

from plugins.mlx5.models import messages
from plugins.mlx5.models.caps import Capabilities
from plugins.mlx5.models.eq import MOST_LOG_SIZE, EventQueues, Ring
from plugins.mlx5.models.firmware import Call, Command
from plugins.mlx5.models.keys import READ, WRITE, Keys
from plugins.mlx5.models.messages import NUMBER_OUT, PLAIN_OUT
from plugins.mlx5.models.status import RefusedError, Status
from plugins.mlx5.models.transport import (
    INIT,
    NO_QUEUE,
    READY_TO_RECEIVE,
    READY_TO_SEND,
    RESET,
    Transport,
)

OK = PLAIN_OUT.pack()
ENTRY = 64
WQE = 16
MTT_MODE = 1
MIGRATED = 3
ENDLESS = 7


class Objects(Protocol):
    """What the commands need of the card."""

    pf_caps: Capabilities
    keys: Keys
    events: EventQueues
    transport: Transport
    vectors: int

    def allocate_uar(self) -> int: ...
    def free_uar(self, number: int) -> None: ...
    def check_uar(self, number: int) -> None: ...
    def events_changed(self) -> None: ...


def addresses(tail: bytes) -> list[int]:
    """A list of be64."""
    return [int.from_bytes(tail[at : at + 8], "big") for at in range(0, len(tail), 8)]


def must(holds: bool, syndrome: int, text: str) -> None:
    """BAD_PARAM unless it holds."""
    if not holds:
        raise RefusedError(Status.BAD_PARAM, syndrome, text)


class ObjectCommands:
    """The PF's."""

    def __init__(self, card: Objects) -> None:
        self._card = card

    def commands(self) -> Iterable[Command]:
        """All of them."""
        return (
            Command(0x800, messages.ALLOC_PD, self._alloc_pd),
            Command(0x801, messages.DEALLOC_PD, self._dealloc_pd),
            Command(0x802, messages.ALLOC_UAR, self._alloc_uar),
            Command(0x803, messages.DEALLOC_UAR, self._dealloc_uar),
            Command(0x200, messages.CREATE_MKEY, self._create_mkey, element=8, most=1 << 21),
            Command(0x202, messages.DESTROY_MKEY, self._destroy_mkey),
            Command(0x301, messages.CREATE_EQ, self._create_eq, element=8),
            Command(0x302, messages.DESTROY_EQ, self._destroy_eq),
            Command(0x303, messages.QUERY_EQ, self._query_eq, out=0x110),
            Command(0x400, messages.CREATE_CQ, self._create_cq, element=8),
            Command(0x401, messages.DESTROY_CQ, self._destroy_cq),
            Command(0x500, messages.CREATE_QP, self._create_qp, element=8),
            Command(0x501, messages.DESTROY_QP, self._destroy_qp),
            Command(0x502, messages.MODIFY_QP, self._to_init),
            Command(0x503, messages.MODIFY_QP, self._to_receive),
            Command(0x504, messages.MODIFY_QP, self._to_send),
        )

    # domains, doorbell pages, keys

    def _alloc_pd(self, call: Call) -> bytes:
        return NUMBER_OUT.pack(number=self._card.keys.allocate_domain())

    def _dealloc_pd(self, call: Call) -> bytes:
        self._card.keys.free_domain(call.values["pd"])
        return OK

    def _alloc_uar(self, call: Call) -> bytes:
        return NUMBER_OUT.pack(number=self._card.allocate_uar())

    def _dealloc_uar(self, call: Call) -> bytes:
        self._card.free_uar(call.values["uar"])
        return OK

    def _create_mkey(self, call: Call) -> bytes:
        v, entries = call.values, addresses(call.tail)
        must(not v["mkey_umem_valid"] and not v["free"], 0x131, "a key in user memory, or a free one")
        must(v["access_mode_4_2"] == 0 and v["access_mode_1_0"] == MTT_MODE, 0x132, "not a list of pages")
        must(not v["a"] and not v["length64"] and not v["bsf_octword_size"], 0x133, "atomics, length64 or BSF")
        must(v["qpn"] == 0xFFFFFF, 0x134, "the key is bound to a QP")
        octwords = v["translations_octword_actual_size"]
        must(bool(entries) and len(entries) == 2 * octwords, 0x135, f"{len(entries)} entries, {octwords} octwords said")
        must(v["translations_octword_size"] == octwords, 0x136, "the two sizes of the list differ")
        if not v["pg_access"]:
            must(not any(entry & 0xFFF for entry in entries), 0x137, "access bits in a list that has none")
            entries = [entry | READ | WRITE if entry else 0 for entry in entries]
        index = self._card.keys.create(
            variant=v["mkey_7_0"],
            pd=v["pd"],
            start=v["start_addr"],
            length=v["len"],
            log_page_size=v["log_page_size"],
            pages=tuple(entries),
            local_read=bool(v["lr"]),
            local_write=bool(v["lw"]),
        )
        return NUMBER_OUT.pack(number=index)

    def _destroy_mkey(self, call: Call) -> bytes:
        self._card.keys.destroy(call.values["mkey_index"])
        return OK

    # event queues

    def _create_eq(self, call: Call) -> bytes:
        v = call.values
        must(not v["status"] and v["st"] in (0, 9), 0x141, "the new event queue has a state")
        must(v["log_eq_size"] <= MOST_LOG_SIZE, 0x142, f"an event queue of 2^{v['log_eq_size']} entries")
        must(v["intr"] < self._card.vectors, 0x143, f"there is no vector {v['intr']}")
        self._card.check_uar(v["uar_page"])
        ring = Ring.checked(addresses(call.tail), v["log_page_size"], ENTRY << v["log_eq_size"], "an event queue")
        mask = sum(v[f"event_bitmask_{word}"] << 64 * word for word in range(4))
        number = self._card.events.create(ring, v["log_eq_size"], v["log_page_size"], v["uar_page"], v["intr"], mask)
        self._card.events_changed()
        return messages.CREATE_EQ_OUT.pack(number=number)

    def _destroy_eq(self, call: Call) -> bytes:
        self._card.events.destroy(call.values["eq_number"])
        return OK

    def _query_eq(self, call: Call) -> bytes:
        queue = self._card.events.get(call.values["eq_number"])
        words = {f"event_bitmask_{n}": queue.mask >> 64 * n & (1 << 64) - 1 for n in range(4)}
        context = {
            "st": 0x9 if queue.armed else 0xA,
            "log_eq_size": queue.log_size,
            "uar_page": queue.uar,
            "intr": queue.vector,
            "log_page_size": queue.log_page_size,
        }
        return messages.QUERY_EQ_OUT.pack({**context, **words})

    # completion queues and queue pairs

    def _create_cq(self, call: Call) -> bytes:
        v = call.values
        must(v["cqe_sz"] == 0, 0x151, "completions of 128 bytes")
        must(v["log_cq_size"] <= MOST_LOG_SIZE, 0x152, f"a completion queue of 2^{v['log_cq_size']} entries")
        must(bool(v["dbr_addr"]) and v["dbr_addr"] % 8 == 0, 0x153, f"a doorbell record at {v['dbr_addr']:#x}")
        self._card.check_uar(v["uar_page"])
        ring = Ring.checked(addresses(call.tail), v["log_page_size"], ENTRY << v["log_cq_size"], "a completion queue")
        number = self._card.transport.create_completions(ring, v["log_cq_size"], v["uar_page"], v["eqn"], v["dbr_addr"])
        return NUMBER_OUT.pack(number=number)

    def _destroy_cq(self, call: Call) -> bytes:
        self._card.transport.destroy_completions(call.values["cqn"])
        return OK

    def _create_qp(self, call: Call) -> bytes:
        v = call.values
        must(v["st"] == 0 and v["pm_state"] == MIGRATED, 0x161, "not a reliable connection, or its path is not set")
        must(bool(v["no_sq"]), 0x162, "a sending queue, which this model has not")
        must(v["rq_type"] in (0, NO_QUEUE) and v["log_rq_stride"] == 0, 0x163, "a receiving queue of another kind")
        caps = self._card.pf_caps
        stamps = int(bool(caps.get("sq_ts_format") or caps.get("qp_ts_format")))
        must(v["ts_format"] == stamps, 0x164, f"time stamps of kind {v['ts_format']}")
        must(v["user_index"] == (0xFFFFFF if caps.get("cqe_version") == 1 else 0), 0x165, "a user index")
        used = ("mtu", "log_msg_max", "remote_qpn", "fl", "ack_timeout", "vhca_port_num", "retry_count", "rnr_retry")
        must(not any(v[name] for name in (*used, "rre", "rwe", "min_rnr_nak")), 0x166, "attributes of a later state")
        self._card.check_uar(v["uar_page"])
        if v["rq_type"] == NO_QUEUE:
            unused = ("cqn_rcv", "log_rq_size", "dbr_addr", "log_page_size")
            must(not call.tail and not any(v[name] for name in unused), 0x167, "parts of a queue that is not there")
            number = self._card.transport.create_pair(v["pd"], None, 0, 0, 0)
            return NUMBER_OUT.pack(number=number)
        must(bool(v["dbr_addr"]) and v["dbr_addr"] % 8 == 0, 0x168, f"a doorbell record at {v['dbr_addr']:#x}")
        ring = Ring.checked(addresses(call.tail), v["log_page_size"], WQE << v["log_rq_size"], "a receiving queue")
        number = self._card.transport.create_pair(v["pd"], ring, v["log_rq_size"], v["dbr_addr"], v["cqn_rcv"])
        return NUMBER_OUT.pack(number=number)

    def _destroy_qp(self, call: Call) -> bytes:
        self._card.transport.destroy_pair(call.values["qpn"])
        return OK

    def _move(self, call: Call, before: int, after: int, allowed: set[str]) -> None:
        """Check a transition; fields that it does not set have to be 0."""
        v = call.values
        pair = self._card.transport.pair(v["qpn"])
        if pair.state != before:
            raise RefusedError(Status.BAD_QP_STATE, 0x171, f"QP {v['qpn']:#x} is in state {pair.state}, not {before}")
        header = {"opcode", "uid", "op_mod", "qpn"}
        others = sorted(name for name, value in v.items() if value and name not in allowed | header)
        must(not others, 0x172, f"the transition to state {after} has no {', '.join(others)}")

    def _to_init(self, call: Call) -> bytes:
        self._move(call, RESET, INIT, {"vhca_port_num", "pm_state", "rre", "rwe"})
        v = call.values
        must(v["vhca_port_num"] == 1 and v["pm_state"] == MIGRATED, 0x173, "another port or path state")
        self._card.transport.pair(v["qpn"]).state = INIT
        return OK

    def _to_receive(self, call: Call) -> bytes:
        allowed = {"mtu", "log_msg_max", "remote_qpn", "fl", "vhca_port_num", "min_rnr_nak"}
        self._move(call, INIT, READY_TO_RECEIVE, allowed)
        v = call.values
        must(1 <= v["mtu"] <= 5, 0x174, f"an MTU of {v['mtu']}")
        must(v["log_msg_max"] <= self._card.pf_caps.get("log_max_msg"), 0x175, "messages beyond the capability")
        must(bool(v["fl"]) and v["vhca_port_num"] == 1, 0x176, "not in loopback on port 1")
        self._card.transport.pair(v["remote_qpn"])
        pair = self._card.transport.pair(v["qpn"])
        pair.remote, pair.state = v["remote_qpn"], READY_TO_RECEIVE
        return OK

    def _to_send(self, call: Call) -> bytes:
        self._move(call, READY_TO_RECEIVE, READY_TO_SEND, {"retry_count", "rnr_retry", "ack_timeout"})
        pair = self._card.transport.pair(call.values["qpn"])
        pair.patient, pair.state = call.values["rnr_retry"] == ENDLESS, READY_TO_SEND
        return OK
