"""Two queue pairs of a physical function that talk to each other: the firmware sends its reports into one, we read.

It knows queues and messages, not what the messages say. Completions are polled from memory. Source: Linux'
mlx5-vfio-pci (cmd.c, mlx5vf_create_rc_qp and what follows).
"""

import errno
from dataclasses import dataclass
from typing import Final

from plugins.mlx5.boot import Caps, query_caps
from plugins.mlx5.buffers import StateBuffer, alloc_pd, dealloc_pd, released
from plugins.mlx5.commands import Commands
from plugins.mlx5.contexts import CAP_ROCE, CQE, ROCE
from plugins.mlx5.layouts import (
    CREATE_CQ,
    CREATE_QP,
    DESTROY_CQ,
    DESTROY_QP,
    INIT2RTR_QP,
    RST2INIT_QP,
    RTR2RTS_QP,
)
from plugins.mlx5.status import CommandError
from vfu_server.dma_memory import DmaBuffer, DmaMemory
from vfu_server.errors import HostError

PAGE: Final = 4096
RECEIVE_BYTES: Final = 2 << 20
WQE: Final = 16
CQE_BYTES: Final = 64
CQE_INVALID: Final = 0xF0
MIGRATED: Final = 3
RQ_NONE: Final = 3
RECEIVE_IMMEDIATE: Final = 3
"""The one completion that is due: a message with immediate data has come."""
_RC: Final = 0
_MTU_4096: Final = 5


@dataclass(frozen=True, slots=True)
class Message:
    """What has come: `immediate` and the bytes."""

    immediate: int
    data: bytes


class LoopbackPair:
    """The pair with its completion queue and receive buffer. `open` first, `close` at the end."""

    def __init__(self, queue: Commands, memory: DmaMemory, general: Caps, uar: int, eqn: int) -> None:
        self._queue = queue
        self._memory = memory
        self._general = general
        self._uar = uar
        self._eqn = eqn
        self._pd: int | None = None
        self._cqn: int | None = None
        self._receiver: int | None = None
        self._sender: int | None = None
        self._rings: DmaBuffer | None = None
        self._buffer: StateBuffer | None = None
        self._slots = 0
        self._message = 0
        self._ci = 0
        self._posted = 0

    @property
    def sender(self) -> int:
        """The firmware's side, by number."""
        assert self._sender is not None
        return self._sender

    @property
    def numbers(self) -> tuple[int | None, int | None, int | None]:
        """Completion queue and both queue pairs, as events name them."""
        return self._cqn, self._receiver, self._sender

    async def open(self, log_message: int) -> None:
        """Make all of it, ready for messages of 2^`log_message` bytes. Raises: nothing is left."""
        try:
            await self._open(log_message)
        except BaseException:
            await self.close()
            raise

    async def _open(self, log_message: int) -> None:
        self._message = 1 << log_message
        size = max(RECEIVE_BYTES, 4 * self._message)
        self._slots = 1 << (size // self._message - 1).bit_length()
        size = self._slots * self._message
        queue = self._queue
        self._pd = await alloc_pd(queue)
        self._rings = await self._memory.allocate(PAGE + self._cq_bytes + self._rq_bytes)
        await self._create_cq()
        self._buffer = StateBuffer(self._memory, size)
        await self._buffer.grow(size)
        await self._buffer.register(queue, self._pd)
        stamp = await self._ts_format()
        self._receiver = await self._create_receiver(stamp)
        answer = await queue.call(CREATE_QP, self._common(stamp), rq_type=RQ_NONE)
        self._sender = answer["qpn"]
        await self._to_init(self._receiver)
        for slot in range(self._slots):
            self._post(slot)
        await self._to_init(self._sender)
        await self._to_receive(self._receiver, self._sender)
        await self._to_receive(self._sender, self._receiver)
        await queue.call(RTR2RTS_QP, qpn=self._sender, ack_timeout=8, retry_count=7, rnr_retry=7)

    @property
    def _cq_bytes(self) -> int:
        return -(-self._slots * CQE_BYTES // PAGE) * PAGE

    @property
    def _rq_bytes(self) -> int:
        return -(-self._slots * WQE // PAGE) * PAGE

    @property
    def _ring(self) -> DmaBuffer:
        assert self._rings is not None
        return self._rings

    def _pas(self, offset: int, length: int) -> bytes:
        first = self._ring.iova + offset
        return b"".join(page.to_bytes(8, "big") for page in range(first, first + length, PAGE))

    async def _create_cq(self) -> None:
        for at in range(PAGE, PAGE + self._cq_bytes, CQE_BYTES):
            self._ring.memory[at + CQE_BYTES - 1] = CQE_INVALID
        answer = await self._queue.call(
            CREATE_CQ,
            tail=self._pas(PAGE, self._cq_bytes),
            log_cq_size=self._slots.bit_length() - 1,
            uar_page=self._uar,
            c_eqn=self._eqn,
            dbr_addr=self._ring.iova + 64,
        )
        self._cqn, self._ci = answer["cqn"], 0

    async def _create_receiver(self, stamp: int) -> int:
        assert self._cqn is not None
        answer = await self._queue.call(
            CREATE_QP,
            self._common(stamp),
            tail=self._pas(PAGE + self._cq_bytes, self._rq_bytes),
            log_rq_size=self._slots.bit_length() - 1,
            cqn_rcv=self._cqn,
            dbr_addr=self._ring.iova,
        )
        return answer["qpn"]

    def _common(self, stamp: int) -> dict[str, int]:
        assert self._pd is not None
        return {
            "st": _RC,
            "pm_state": MIGRATED,
            "pd": self._pd,
            "no_sq": 1,
            "ts_format": stamp,
            "uar_page": self._uar,
            "user_index": 0xFFFFFF if self._general["cqe_version"] == 1 else 0,
        }

    async def _ts_format(self) -> int:
        """Timestamps in the default format, where the firmware knows others besides the free-running one."""
        if self._general["sq_ts_format"]:
            return 1
        try:
            return int((await query_caps(self._queue, CAP_ROCE, ROCE))["qp_ts_format"] > 0)
        except CommandError:
            return 0

    async def _to_init(self, qpn: int) -> None:
        await self._queue.call(RST2INIT_QP, qpn=qpn, pm_state=MIGRATED, vhca_port_num=1, rre=1, rwe=1)

    async def _to_receive(self, qpn: int, other: int) -> None:
        await self._queue.call(
            INIT2RTR_QP,
            qpn=qpn,
            mtu=_MTU_4096,
            log_msg_max=self._general["log_max_msg"],
            remote_qpn=other,
            fl=1,
            vhca_port_num=1,
            min_rnr_nak=1,
        )

    def _post(self, slot: int) -> None:
        """Offer a slot of the receive buffer for the next message."""
        assert self._buffer is not None
        at = PAGE + self._cq_bytes + (self._posted % self._slots) * WQE
        parts = (self._message.to_bytes(4, "big"), self._buffer.mkey.to_bytes(4, "big"))
        self._ring.memory[at : at + WQE] = b"".join((*parts, (slot * self._message).to_bytes(8, "big")))
        self._posted += 1
        self._ring.memory[0:4] = (self._posted & 0xFFFF).to_bytes(4, "big")  # last: now it is the device's

    def poll(self) -> Message | None:
        """The next message, if one has come. HostError EIO: anything else has."""
        assert self._buffer is not None
        at = PAGE + (self._ci % self._slots) * CQE_BYTES
        owner = self._ring.memory[at + CQE_BYTES - 1]
        if owner >> 4 == CQE_INVALID >> 4 or owner & 1 != self._ci // self._slots & 1:
            return None
        entry = bytes(self._ring.memory[at : at + CQE_BYTES])
        kind, length = CQE.get(entry, "opcode"), CQE.get(entry, "byte_cnt")
        slot = CQE.get(entry, "wqe_counter") & (self._slots - 1)
        if kind != RECEIVE_IMMEDIATE or length > self._message:
            raise HostError(f"a completion of kind {kind} with {length} bytes in a page report", errno.EIO)
        data = self._buffer.read(slot * self._message, length)
        self._ci += 1
        self._ring.memory[64:68] = (self._ci & 0xFFFFFF).to_bytes(4, "big")
        self._post(slot)
        return Message(CQE.get(entry, "immediate"), data)

    async def close(self) -> None:
        """Take all down, in the opposite order; what fails is logged."""
        queue, name = self._queue, self._queue.name
        sender, self._sender = self._sender, None
        receiver, self._receiver = self._receiver, None
        cqn, self._cqn = self._cqn, None
        pd, self._pd = self._pd, None
        if sender is not None:
            await released(queue.call(DESTROY_QP, qpn=sender), name)
        if receiver is not None:
            await released(queue.call(DESTROY_QP, qpn=receiver), name)
        if self._buffer is not None:
            buffer, self._buffer = self._buffer, None
            await buffer.free(queue)
        if cqn is not None:
            await released(queue.call(DESTROY_CQ, cqn=cqn), name)
        if pd is not None:
            await released(dealloc_pd(queue, pd), name)
        if self._rings is not None:
            rings, self._rings = self._rings, None
            await released(self._memory.free(rings), name)
