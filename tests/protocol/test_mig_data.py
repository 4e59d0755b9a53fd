"""MIG_DATA_READ and MIG_DATA_WRITE: chunks of a megabyte, waits, ends, refusals; the test has the ring's other end."""

import errno
import random

import pytest
import trio

from tests.protocol.served import REGISTERS
from vfu_server import uapi
from vfu_server.errors import MigrationError
from vfu_server.testing import ReplyError
from vfu_server.uapi import Command

MIB = 1 << 20


def noise(size):
    return random.Random(size).randbytes(size)


def put(served, data):
    trio.run(served.context.ring.send, data)


def read_message(client, size):
    return client.send_message(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(8 + size, size))


def write_message(client, data):
    return client.send_message(Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(8 + len(data), len(data)) + data)


def test_without_a_session_both_are_refused(client):
    for act in (lambda: client.mig_data_read(4096), lambda: client.mig_data_write(b"data")):
        with pytest.raises(ReplyError) as caught:
            act()
        assert caught.value.errno == errno.EINVAL


def test_a_save_is_read_in_chunks_up_to_its_end(served, client):
    data = noise(2 * MIB + 12345)
    served.context.ring.open_save(pre_copy=False)
    put(served, data)
    served.context.ring.finish()
    chunks = [client.mig_data_read(MIB) for _ in range(5)]
    assert [len(chunk) for chunk in chunks] == [MIB, MIB, 12345, 0, 0]
    assert b"".join(chunks) == data
    with pytest.raises(ReplyError):
        client.mig_data_write(b"while saving")


@pytest.mark.parametrize("size", [1, 7, 4096, MIB - 1, MIB])
def test_a_read_gets_what_is_there_and_says_how_much(served, client, size):
    served.context.ring.open_save(pre_copy=False)
    put(served, noise(MIB))
    got = client.mig_data_read(size)
    assert got == noise(MIB)[:size]
    put(served, b"!")
    left = MIB - size + 1
    reply = client.call(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(8 + MIB, MIB), room=8 + MIB)
    assert reply.payload[:8] == uapi.MIG_DATA.pack(8 + min(left, MIB), min(left, MIB))
    assert len(reply.payload) == 8 + min(left, MIB)


def test_the_ring_goes_round_many_times(served, client):
    served.context.ring.open_save(pre_copy=True)
    saved = []
    for n in range(40):
        part = noise(300_000 + n)
        put(served, part)
        saved.append(client.mig_data_read(MIB) == part)
    assert all(saved)
    assert served.context.ring.total == sum(300_000 + n for n in range(40))


def test_in_pre_copy_an_empty_ring_is_told(served, client):
    served.context.ring.open_save(pre_copy=True)
    with pytest.raises(ReplyError) as caught:
        client.mig_data_read(100)
    assert caught.value.errno == errno.ENOMSG
    put(served, b"early")
    assert client.mig_data_read(100) == b"early"
    with pytest.raises(ReplyError) as caught:
        client.mig_data_read(100)
    assert caught.value.errno == errno.ENOMSG


def test_in_stop_copy_a_read_waits_and_accesses_go_on(served, client):
    served.context.ring.open_save(pre_copy=False)
    waiting = read_message(client, 100)
    later = client.send_message(Command.DEVICE_RESET)
    served.settle(client)
    assert served.context.ring.wanted
    assert not client.has_reply(waiting)
    assert served.no_message()
    put(served, b"late")
    assert client.wait_reply(waiting).payload == uapi.MIG_DATA.pack(12, 4) + b"late"
    served.message(Command.DEVICE_RESET)
    served.context.reply()
    assert client.wait_reply(later).errno == 0


@pytest.mark.parametrize(
    ("end", "answer"),
    [("finish", (0, uapi.MIG_DATA.pack(8, 0))), ("fail", (errno.EIO, b"")), ("close", (errno.EINVAL, b""))],
)
def test_a_read_that_waits_is_ended_with_the_session(served, client, end, answer):
    served.context.ring.open_save(pre_copy=False)
    waiting = read_message(client, 100)
    served.settle(client)
    getattr(served.context.ring, end)(*([errno.EIO] if end == "fail" else []))
    reply = client.wait_reply(waiting)
    assert (reply.errno, reply.payload) == answer


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMSG, errno.ENODATA, errno.EBUSY])
@pytest.mark.parametrize("pre_copy", [True, False])
def test_a_fault_is_told_whatever_its_errno(served, client, number, pre_copy):
    """`try again`, of a device that has no resources, is no reason to let the client wait for ever."""
    ring = served.context.ring
    ring.open_save(pre_copy=pre_copy)
    ring.more_to_come()
    waiting = read_message(client, 100)
    served.settle(client)
    ring.fail(number)
    told = number if number == errno.EBUSY else errno.EIO
    assert client.wait_reply(waiting).errno == told
    ring.open_load()
    ring.fail(number)
    assert client.wait_reply(write_message(client, b"data")).errno == told


def test_the_end_of_pre_copy_makes_reads_wait(served, client):
    served.context.ring.open_save(pre_copy=True)
    served.context.ring.more_to_come()
    waiting = read_message(client, 100)
    assert client.read(0, REGISTERS, 4) == 0
    assert not client.has_reply(waiting)
    put(served, b"rest")
    assert client.wait_reply(waiting).payload[8:] == b"rest"


def test_nothing_for_now_is_told_to_a_read_that_waits(served, client):
    ring = served.context.ring
    ring.open_save(pre_copy=True)
    ring.more_to_come()
    waiting = read_message(client, 100)
    served.settle(client)
    ring.nothing_for_now()
    assert client.wait_reply(waiting).errno == errno.ENOMSG
    with pytest.raises(ReplyError) as caught:
        client.mig_data_read(100)
    assert caught.value.errno == errno.ENOMSG


def test_one_reader_is_excused_and_the_next_waits(served, client):
    ring = served.context.ring
    ring.open_save(pre_copy=True)
    ring.more_to_come()
    waiting, behind = read_message(client, 100), read_message(client, 100)
    served.settle(client)
    ring.excuse_reader()
    assert client.wait_reply(waiting).errno == errno.ENOMSG
    served.settle(client)
    assert not client.has_reply(behind)
    assert ring.wanted
    put(served, b"data")
    assert client.wait_reply(behind).payload[8:] == b"data"


def test_an_excuse_is_spent_or_forgotten(served, client):
    ring = served.context.ring
    ring.open_save(pre_copy=True)
    ring.excuse_reader()
    ring.more_to_come()
    waiting = read_message(client, 100)
    served.settle(client)
    assert not client.has_reply(waiting)
    put(served, b"1234")
    assert client.wait_reply(waiting).payload[8:] == b"1234"
    assert (ring.used, ring.total) == (0, 4)
    put(served, b"56789")
    assert (ring.used, ring.total) == (5, 9)


def test_what_was_saved_is_read_before_a_failure_is_told(served, client):
    served.context.ring.open_save(pre_copy=False)
    put(served, b"good")
    served.context.ring.fail(errno.EIO)
    assert client.mig_data_read(100) == b"good"
    with pytest.raises(ReplyError) as caught:
        client.mig_data_read(100)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("sizes", [[MIB] * 8, [1, MIB, 4096, MIB, 13], [0, 5, 0]])
def test_a_load_arrives_whole_and_in_order(served, client, sizes):
    ring = served.context.ring
    ring.open_load()
    data = [noise(size) for size in sizes]
    got = b""

    async def take(size):
        return await ring.receive(size)

    for part in data:
        client.mig_data_write(part)
        if part:
            got += trio.run(take, 2 * MIB)
    assert got == b"".join(data)
    ring.finish()
    assert trio.run(take, 10) is None
    with pytest.raises(ReplyError):
        client.mig_data_read(10)


@pytest.mark.parametrize("sizes", [[MIB] * 3, [4096] * 700, [MIB, 5, 600_000, 4096, MIB]])
def test_a_look_waits_for_as_much_as_is_wanted_or_the_end(served, client, sizes):
    """In pieces where they lie; whatever they are, they are what came in."""
    ring = served.context.ring
    ring.open_load()
    data = [noise(size) for size in sizes]
    total = sum(sizes)

    async def look(least):
        pieces = await ring.look(2 * total, least)
        found = b"".join(pieces)
        for piece in pieces:
            piece.release()
        return found

    async def wait_while_it_comes():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, lambda: [client.mig_data_write(part) for part in data])
            return await look(total)

    assert trio.run(wait_while_it_comes) == b"".join(data)
    ring.consume(total - 10)
    ring.finish()
    assert trio.run(look, total) == b"".join(data)[-10:]
    ring.consume(10)
    assert trio.run(ring.look, 1, total) is None


def test_what_lies_behind_a_large_write_is_not_lost(served, client):
    """Messages read ahead go on in another buffer."""
    ring = served.context.ring
    ring.open_load()
    ids = []
    for n in range(3):
        ids += [write_message(client, bytes([n]) * 700_000), *(write_message(client, bytes([n, m])) for m in range(9))]
    assert [client.wait_reply(msg_id).errno for msg_id in ids] == [0] * len(ids)
    got = b""
    while len(got) < 3 * 700_018:
        got += trio.run(ring.receive)
    assert got == b"".join(bytes([n]) * 700_000 + b"".join(bytes([n, m]) for m in range(9)) for n in range(3))


def test_a_write_waits_for_room_and_accesses_go_on(served, client):
    ring = served.context.ring
    ring.open_load()
    ids = [write_message(client, bytes([n]) * MIB) for n in range(6)]
    assert client.read(0, REGISTERS, 4) == 0
    assert [client.has_reply(msg_id) for msg_id in ids] == [True] * 3 + [False] * 3
    got = []
    for _ in range(6):
        got.append(trio.run(ring.receive, MIB))
    assert [client.wait_reply(msg_id).errno for msg_id in ids] == [0] * 6
    assert b"".join(got) == b"".join(bytes([n]) * MIB for n in range(6))


def test_a_write_that_waits_is_refused_when_the_load_fails(served, client):
    served.context.ring.open_load()
    ids = [write_message(client, bytes(MIB)) for n in range(4)]
    assert client.read(0, REGISTERS, 4) == 0
    served.context.ring.fail(errno.EILSEQ)
    assert [client.wait_reply(msg_id).errno for msg_id in ids] == [0] * 3 + [errno.EILSEQ]


@pytest.mark.parametrize(
    "payload",
    [
        uapi.MIG_DATA.pack(12, 5) + b"four",
        uapi.MIG_DATA.pack(12, 3) + b"four",
        uapi.MIG_DATA.pack(8, 0xFFFFFFFF),
        uapi.MIG_DATA.pack(9 + MIB, MIB + 1) + bytes(MIB + 1),
        b"\0\0\0\0",
    ],
    ids=len,
)
def test_writes_that_do_not_carry_what_they_say(served, client, payload):
    served.context.ring.open_load()
    with pytest.raises(ReplyError) as caught:
        client.call(Command.MIG_DATA_WRITE, payload)
    assert caught.value.errno == errno.EINVAL
    assert served.context.ring.total == 0


@pytest.mark.parametrize("size", [MIB + 1, 64 << 20, 0xFFFFFFFF])
def test_reads_of_more_than_a_transfer_are_refused(served, client, size):
    served.context.ring.open_save(pre_copy=False)
    put(served, b"data")
    with pytest.raises(ReplyError) as caught:
        client.call(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(8, size), room=4096)
    assert caught.value.errno == errno.EINVAL


def test_the_clients_own_limit_bounds_its_reads(served):
    with served.connect(caps={"max_data_xfer_size": 65536}) as client:
        served.context.ring.open_save(pre_copy=False)
        put(served, bytes(100_000))
        assert len(client.mig_data_read(65536)) == 65536
        with pytest.raises(ReplyError) as caught:
            client.mig_data_read(65537)
        assert caught.value.errno == errno.EINVAL


def test_a_client_that_leaves_while_its_read_waits(served):
    with served.connect() as client:
        served.context.ring.open_save(pre_copy=False)
        read_message(client, 100)
        served.settle(client)
    assert not served.context.ring.wanted
    served.context.ring.close()
    with pytest.raises(MigrationError):
        put(served, b"nobody")
    with served.connect() as client:
        assert client.read(0, REGISTERS, 4) == 0
