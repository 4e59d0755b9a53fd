"""REGION_READ, REGION_WRITE and REGION_WRITE_MULTI: widths, bounds, large transfers, refusals, posted writes."""

import errno
import struct

import pytest

from tests.protocol.served import (
    BAR0_SIZE,
    BAR2_SIZE,
    DROPPED,
    MAPPED,
    REG_BROKEN,
    REGISTERS,
    UNDECLARED,
    access,
)
from vfu_server import uapi
from vfu_server.testing import ReplyError
from vfu_server.uapi import Command, HeaderFlag, RegionIndex

MIB = 1 << 20


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_every_register_width(served, client, width):
    value = int.from_bytes(bytes(range(1, 9))[:width], "little")
    client.write(0, 0x40, width, value)
    assert client.read(0, 0x40, width) == value
    assert served.registers.log == [(True, 0, 0x40, width), (False, 0, 0x40, width)]


@pytest.mark.parametrize("width", [3, 5, 6, 7, 16, 4096])
def test_a_width_that_no_register_has_is_refused(served, client, width):
    for act in (lambda: client.region_read(0, 0, width), lambda: client.region_write(0, 0, bytes(width))):
        with pytest.raises(ReplyError) as caught:
            act()
        assert caught.value.errno == errno.EINVAL
    assert served.registers.log == []


@pytest.mark.parametrize("width", [1, 3, 4095, 4096, 65536, MIB])
def test_any_width_where_the_policy_allows_it(client, width):
    data = bytes(n * 7 & 0xFF for n in range(width))
    client.region_write(2, 1, data)
    assert client.region_read(2, 1, width) == data
    client.region_write(2, BAR2_SIZE - width, data[::-1])
    assert client.region_read(2, BAR2_SIZE - width, width) == data[::-1]


def test_more_than_a_transfer_may_carry_is_refused(served, client):
    with pytest.raises(ReplyError) as caught:
        client.region_read(2, 0, MIB + 1)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ReplyError) as caught:
        client.region_write(2, 0, bytes(MIB + 1))
    assert caught.value.errno == errno.EINVAL
    assert served.registers.log == []


@pytest.mark.parametrize(
    ("region", "offset", "count"),
    [
        (0, BAR0_SIZE, 4),
        (0, BAR0_SIZE - 2, 4),
        (2, BAR2_SIZE - MIB + 1, MIB),
        (0, (1 << 64) - 4, 4),
        (0, (1 << 64) - 4, 8),
        (0, 1 << 63, 4),
        (1, 0, 4),
        (RegionIndex.CONFIG, 256, 1),
        (RegionIndex.VGA, 0, 4),
        (9, 0, 4),
        (0xFFFFFFFF, 0, 4),
    ],
)
def test_accesses_outside_of_the_device_are_refused(served, client, region, offset, count):
    for act in (
        lambda: client.region_read(region, offset, count),
        lambda: client.region_write(region, offset, bytes(count)),
    ):
        with pytest.raises(ReplyError) as caught:
            act()
        assert caught.value.errno == errno.EINVAL
    assert served.registers.log == []


@pytest.mark.parametrize(("count", "sent"), [(4, 3), (4, 5), (0, 4), (4, 0), (0xFFFFFFFF, 4)])
def test_a_write_whose_count_and_data_differ_is_refused(served, client, count, sent):
    msg_id = client.send_message(Command.REGION_WRITE, access(0, 0, count, bytes(sent)))
    assert client.wait_reply(msg_id).errno == errno.EINVAL
    assert served.registers.log == []


@pytest.mark.parametrize("command", [Command.REGION_READ, Command.REGION_WRITE])
def test_an_access_of_no_bytes_is_answered_and_touches_nothing(served, client, command):
    msg_id = client.send_message(command, access(0, 0, 0))
    reply = client.wait_reply(msg_id)
    assert reply.flags & HeaderFlag.TYPE_MASK == HeaderFlag.REPLY
    assert served.registers.log == []


def test_a_refusal_carries_the_errno_of_the_target_and_nothing_else(client):
    for command, data in ((Command.REGION_READ, b""), (Command.REGION_WRITE, b"abcd")):
        msg_id = client.send_message(command, access(0, REG_BROKEN, 4, data))
        reply = client.wait_reply(msg_id)
        assert (reply.flags, reply.errno, reply.payload) == (0x21, errno.EXDEV, b"")


def test_what_the_policy_does_not_name_is_refused(client):
    with pytest.raises(ReplyError) as caught:
        client.read(0, UNDECLARED, 4)
    assert caught.value.errno == errno.EPERM


def test_an_access_over_the_edge_of_a_rule_is_refused(served, client):
    for offset in (REGISTERS + 0xFFE, DROPPED + 0xFFC):
        with pytest.raises(ReplyError) as caught:
            client.read(0, offset, 8)
        assert caught.value.errno == errno.EINVAL
    assert served.registers.log == []


def test_dropped_accesses_are_all_ones_and_no_trap(served, client):
    client.write(0, DROPPED, 4, 5)
    assert client.read(0, DROPPED, 8) == (1 << 64) - 1
    assert served.registers.log == []


def test_a_mapped_area_without_a_device_behind_is_an_error_and_no_crash(client):
    with pytest.raises(ReplyError) as caught:
        client.read(0, MAPPED, 4)
    assert caught.value.errno == errno.ENXIO


def test_config_space_in_one_read(served, client):
    served.registers.memory[RegionIndex.CONFIG][:] = bytes(range(256))
    assert client.region_read(RegionIndex.CONFIG, 0, 256) == bytes(range(256))
    assert served.registers.log == [(False, RegionIndex.CONFIG, 0, 256)]


def test_posted_writes_keep_their_order_and_get_no_reply(served, client):
    for n in range(200):
        client.write(0, 8 * (n % 64), 8, n, posted=True)
    assert client.read(0, 8 * (199 % 64), 8) == 199
    assert [entry[2] for entry in served.registers.log[:-1]] == [8 * (n % 64) for n in range(200)]


def test_trapped_accesses_keep_their_value_bits(client):
    client.write(0, 0x20, 8, (1 << 64) - 2)
    assert client.read(0, 0x20, 8) == (1 << 64) - 2
    assert client.read(0, 0x24, 4) == 0xFFFFFFFF
    assert client.read(0, 0x20, 1) == 0xFE


@pytest.mark.parametrize("flags", [0, HeaderFlag.NO_REPLY])
def test_write_multi_is_refused_since_it_was_not_negotiated(served, client, flags):
    one = struct.pack("<QII8s", 0, 0, 4, b"abcd")
    msg_id = client.send_message(Command.REGION_WRITE_MULTI, struct.pack("<Q", 1) + one, flags=flags)
    if not flags:
        assert client.wait_reply(msg_id).errno == errno.EINVAL
    served.settle(client)
    assert served.registers.log == [(False, 0, REGISTERS, 4)]


def test_accesses_are_counted_by_answer(served, client):
    client.read(0, DROPPED, 4)
    client.write(0, DROPPED, 4, 1)
    client.write(0, REGISTERS, 4, 1)
    counted = {(a.name, s.name, way): n for (a, s, way), n in served.context.statistics().accesses.items()}
    assert counted == {
        ("DISCARD", "RUNNING", "read"): 1,
        ("DISCARD", "RUNNING", "write"): 1,
        ("TRAP", "RUNNING", "write"): 1,
    }
    assert uapi.MAX_DATA_XFER_SIZE == MIB
