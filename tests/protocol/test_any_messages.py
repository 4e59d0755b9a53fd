"""Whatever a client sends, in any pieces and with any fds: the server answers or ends the connection, and lives."""

import contextlib
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.protocol.served import REG_SLOW, Served, fd_count
from vfu_server import uapi
from vfu_server.errors import DeadlineError
from vfu_server.testing import ConnectionClosedError, pack_message
from vfu_server.uapi import Command, HeaderFlag

EDGES = [0, 1, 2, 4, 7, 8, 9, 15, 16, 20, 24, 32, 0x40, 0xFFF, 0x1000, 0x1001, 0x2000, 1 << 20, (1 << 20) + 1, 1 << 31]
EDGES += [0xFFFFFFFF, 0xFFFFFFFE, 0x10002, 0x20002, 0x20006, 0x10008, 0x40000]
u32 = st.sampled_from(EDGES) | st.integers(0, 0xFFFFFFFF)
u64 = u32 | st.sampled_from([1 << 32, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1)


def packed(layout, *fields):
    return st.tuples(*fields).map(lambda values: layout.pack(*values))


LAYOUTS = {
    Command.DMA_MAP: packed(uapi.DMA_MAP, u32, u32, u64, u64, u64),
    Command.DMA_UNMAP: packed(uapi.DMA_UNMAP, u32, u32, u64, u64),
    Command.DEVICE_GET_INFO: packed(uapi.DEVICE_INFO, u32, u32, u32, u32),
    Command.DEVICE_GET_REGION_INFO: packed(uapi.REGION_INFO, u32, u32, u32, u32, u64, u64),
    Command.DEVICE_GET_REGION_IO_FDS: packed(uapi.IRQ_INFO, u32, u32, u32, u32),
    Command.DEVICE_GET_IRQ_INFO: packed(uapi.IRQ_INFO, u32, u32, u32, u32),
    Command.DEVICE_SET_IRQS: packed(uapi.IRQ_SET, u32, u32, u32, u32, u32),
    Command.REGION_READ: packed(uapi.REGION_ACCESS, u64, u32, u32),
    Command.REGION_WRITE: packed(uapi.REGION_ACCESS, u64, u32, u32),
    Command.DEVICE_FEATURE: packed(uapi.DEVICE_FEATURE, u32, u32),
    Command.MIG_DATA_READ: packed(uapi.MIG_DATA, u32, u32),
    Command.MIG_DATA_WRITE: packed(uapi.MIG_DATA, u32, u32),
}


@st.composite
def messages(draw):
    """(bytes of a message, how many fds go with it, where to cut it)."""
    command = draw(st.sampled_from(list(Command)) | st.integers(0, 0xFFFF))
    payload = draw(LAYOUTS.get(command, st.binary(max_size=64))) + draw(st.binary(max_size=40))
    payload = payload[: draw(st.integers(0, len(payload)) | st.just(len(payload)))]
    flags = draw(st.sampled_from([0, 0, 0, HeaderFlag.NO_REPLY, HeaderFlag.REPLY, 0x21, 2]) | u32)
    size = draw(st.just(None) | st.just(None) | st.just(None) | u32)
    data = pack_message(command, payload, msg_id=draw(st.integers(0, 0xFFFF)), flags=flags, size=size)
    return data, draw(st.sampled_from([0, 0, 0, 1, 2, 8, 9])), draw(st.integers(0, len(data)))


def answer_all(served):
    served.take_events()
    while served.messages:
        message = served.messages.pop(0)
        for fd in message.fds:
            os.close(fd)
        served.context.reply(error=95)
        served.take_events()


def talk(served, client, heap, fd):
    for data, fds, cut in heap:
        client.send_raw(data[:cut] or data, [fd] * fds)
        if 0 < cut < len(data):
            client.send_raw(data[cut:])
        answer_all(served)
    # half a message may be on its way: no answer is an answer, too
    client.send_message(Command.DEVICE_GET_INFO, uapi.DEVICE_INFO.pack(16, 0, 0, 0), msg_id=0xABCD)
    while True:
        answer_all(served)
        try:
            message = client.recv_message(0.02)
        except DeadlineError:
            answer_all(served)
            if served.no_message():
                return
            continue
        message.close_fds()
        if (message.msg_id, message.command) == (0xABCD, Command.DEVICE_GET_INFO):
            return


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(heap=st.lists(messages(), min_size=1, max_size=12))
def test_any_messages(heap):
    before = fd_count()
    served = Served(max_maps=16)
    served.registers.gate.set()
    fd = os.memfd_create("given")
    os.ftruncate(fd, 1 << 20)
    with served.connect() as client, contextlib.suppress(ConnectionClosedError):
        talk(served, client, heap, fd)
    with served.connect() as client:
        assert client.read(0, REG_SLOW, 4) in range(1 << 32)
    os.close(fd)
    served.close()
    assert not served.faults
    assert fd_count() == before


@settings(max_examples=60, deadline=None, derandomize=True)
@given(noise=st.binary(min_size=1, max_size=300), negotiated=st.booleans())
def test_any_bytes(noise, negotiated):
    before = fd_count()
    served = Served()
    with served.connect(negotiate=negotiated) as client, contextlib.suppress(ConnectionClosedError):
        client.send_raw(noise)
    with served.connect() as client:
        assert client.get_info().num_irqs == 5
    served.close()
    assert fd_count() == before
