"""What is held while the session works on a message, what is not, and that the order is kept."""

import errno
import os
import time

import pytest

from tests.protocol.served import FLR_BIT, FLR_BYTE, REG_SLOW, REGISTERS, access, deaf_feature
from vfu_server import uapi
from vfu_server.testing import GuestMemory
from vfu_server.uapi import Command, Feature, HeaderFlag, RegionIndex

STOP_COPY = uapi.DEVICE_FEATURE.pack(16, uapi.FEATURE_SET | Feature.MIG_DEVICE_STATE) + uapi.FEATURE_STATE.pack(3, -1)
DISARM = uapi.IRQ_SET.pack(20, 0x24, 2, 0, 1)
ORDERED = [
    (Command.DEVICE_SET_IRQS, DISARM),
    (Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0x1000, 0x1000)),
    (Command.DEVICE_RESET, b""),
    (Command.DEVICE_FEATURE, STOP_COPY),
    (Command.REGION_WRITE, access(RegionIndex.CONFIG, FLR_BYTE, 1, bytes([FLR_BIT]))),
]
"""Messages that come up, whatever they say."""


@pytest.fixture
def busy(served, client):
    """The client, with a state change under way that the session has not answered."""
    client.pending = client.send_message(Command.DEVICE_FEATURE, STOP_COPY)
    served.message(Command.DEVICE_FEATURE)
    return client


@pytest.mark.parametrize(("command", "payload"), ORDERED)
def test_messages_of_the_ordered_kind_are_held(served, busy, command, payload):
    msg_id = busy.send_message(command, payload)
    served.settle(busy)
    assert served.no_message()
    assert not busy.has_reply(msg_id)
    served.context.reply(STOP_COPY)
    assert busy.wait_reply(busy.pending).payload == STOP_COPY
    assert served.message(command).payload == payload
    served.context.reply(error=errno.EBUSY)
    assert busy.wait_reply(msg_id).errno == errno.EBUSY


def test_what_the_pump_does_by_itself_is_held_too(served, busy):
    with GuestMemory.of(1 << 16) as memory:
        mapped = busy.send_message(Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0x1000, 0x1000), [memory.fd])
        unmap = busy.send_message(Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(24, 0, 0x1000, 0x1000))
        read = busy.send_message(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(108, 100))
        write = busy.send_message(Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(10, 2) + b"ab")
        served.settle(busy)
        assert not any(busy.has_reply(msg_id) for msg_id in (mapped, unmap, read, write))
        assert served.door.numbers().dma_maps == 0
        served.context.reply(STOP_COPY)
        errors = [busy.wait_reply(msg_id).errno for msg_id in (busy.pending, mapped, unmap, read, write)]
        assert errors == [0, 0, 0, errno.EINVAL, errno.EINVAL]


def test_accesses_and_infos_are_never_held(served, busy):
    assert busy.read(0, REGISTERS, 4) == 0
    busy.write(0, 0x40, 4, 7)
    busy.write(0, 0x44, 4, 8, posted=True)
    assert busy.read(0, 0x40, 8) == 8 << 32 | 7
    assert busy.region_read(RegionIndex.CONFIG, 0, 256) == bytes(256)
    busy.region_write(RegionIndex.CONFIG, 4, b"\7\0")
    assert busy.get_info().num_irqs == 5
    assert busy.get_irq_info(2).count == 32
    info = busy.get_region_info(0)
    os.close(info.fd)
    assert not busy.has_reply(busy.pending)
    served.context.reply(STOP_COPY)
    assert busy.wait_reply(busy.pending).errno == 0


def test_a_thousand_held_messages_come_up_in_order(served, busy):
    ids = [busy.send_message(Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(20, 0x24, 2, n, 1)) for n in range(1000)]
    served.settle(busy)
    served.context.reply(STOP_COPY)
    for n, msg_id in enumerate(ids):
        assert uapi.IRQ_SET.unpack(served.message().payload)[3] == n
        assert not busy.has_reply(msg_id)
        served.context.reply(error=n % 2)
        reply = busy.wait_reply(msg_id)
        assert (reply.flags, reply.errno) == ((1, 0), (0x21, 1))[n % 2]
    assert busy.wait_reply(busy.pending).errno == 0


def test_more_than_the_server_will_hold_waits_in_the_socket(served, busy):
    """Beyond a limit the pump stops reading; nothing is lost."""
    count = 6000
    raw = b"".join(
        uapi.HEADER.pack(n, Command.DEVICE_SET_IRQS, 36, HeaderFlag.NO_REPLY, 0) + uapi.IRQ_SET.pack(20, 0x24, 2, n, 1)
        for n in range(count)
    )
    busy.send_raw(raw)
    read = busy.send_message(Command.REGION_READ, access(0, REGISTERS, 4))
    assert not busy.has_reply(read)
    served.context.reply(STOP_COPY)
    for n in range(count):
        message = served.message()
        assert (message.no_reply, uapi.IRQ_SET.unpack(message.payload)[3]) == (True, n)
        served.context.reply()
    assert busy.wait_reply(read).errno == 0


def test_a_trap_that_takes_long_delays_no_more_than_it_must(served, client):
    """The pump has one thread: what came behind waits for the access, and is served right after it."""
    slow = client.send_message(Command.REGION_READ, access(0, REG_SLOW, 4))
    assert served.registers.entered.wait(5)
    fast = client.send_message(Command.REGION_READ, access(0, REGISTERS, 4))
    feature = deaf_feature(client)
    assert not client.has_reply(fast)
    served.registers.gate.set()
    assert client.wait_reply(slow).errno == client.wait_reply(fast).errno == 0
    served.message(Command.DEVICE_FEATURE)
    served.context.reply(error=errno.ENOTTY)
    assert client.wait_reply(feature).errno == errno.ENOTTY


def test_another_device_goes_on_while_one_is_busy(served, busy):
    from tests.protocol.served import Served

    other = Served()
    begun = time.monotonic()
    with other.connect() as client:
        for _ in range(100):
            client.read(0, REGISTERS, 4)
        _, reply = other.answer(client, Command.DEVICE_RESET)
        assert reply.errno == 0
    assert time.monotonic() - begun < 4.5
    other.close()
    served.context.reply(STOP_COPY)


def test_a_reply_after_the_client_has_gone_is_harmless(served):
    with served.connect() as client:
        deaf_feature(client)
        served.message(Command.DEVICE_FEATURE)
        client.close()
        served.wait(lambda: served.ended is not None)
        served.context.reply(error=errno.EIO)
    with served.connect() as client:
        assert client.read(0, REGISTERS, 4) == 0
        served.settle(client)
        assert served.no_message()


def test_what_an_old_client_left_unanswered_is_not_sent_to_the_next(served):
    with served.connect() as client:
        deaf_feature(client)
        served.message(Command.DEVICE_FEATURE)
    with served.connect() as client:
        served.context.reply(b"for the old one")
        assert client.get_info().num_irqs == 5
        message, reply = served.answer(client, Command.DEVICE_RESET)
        assert (message.command, reply.errno) == (Command.DEVICE_RESET, 0)


def test_a_function_level_reset_by_config_write_is_a_message(served, client):
    payload = access(RegionIndex.CONFIG, FLR_BYTE - 1, 4, bytes([1, FLR_BIT | 1, 2, 3]))
    message, reply = served.answer(client, Command.REGION_WRITE, payload, reply=payload[:16])
    assert message.payload == payload
    assert reply.payload == payload[:16]
    assert served.registers.log == []


@pytest.mark.parametrize("data", [(FLR_BYTE, b"\x7f"), (FLR_BYTE - 1, b"\xff"), (FLR_BYTE + 1, b"\xff")])
def test_other_writes_to_config_space_are_none(served, client, data):
    client.region_write(RegionIndex.CONFIG, *data)
    assert served.registers.log == [(True, RegionIndex.CONFIG, data[0], 1)]
