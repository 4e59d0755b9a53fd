"""The shipped client against a scripted peer: every byte it sends is compared, its replies lie ready before it asks."""

import errno
import json
import os
import socket
import struct
import time

import pytest

from vfu_server import uapi
from vfu_server.errors import DeadlineError
from vfu_server.host_device import IrqInfo, MmapArea
from vfu_server.testing import (
    Client,
    ConnectionClosedError,
    ProtocolError,
    ReplyError,
    dirty_pages,
    pack_message,
)
from vfu_server.uapi import Command, HeaderFlag, MigState


class Peer:
    """The server's end. Replies are written before the client asks: ids count from 0."""

    def __init__(self, sock):
        self.sock = sock
        self.next_id = 0

    def reply(self, command, payload=b"", *, error=0, fds=(), msg_id=None, size=None):
        if msg_id is None:
            msg_id, self.next_id = self.next_id, self.next_id + 1
        flags = HeaderFlag.REPLY | (HeaderFlag.ERROR if error else 0)
        data = pack_message(command, payload, msg_id=msg_id, flags=flags, error=error, size=size)
        socket.send_fds(self.sock, [data], list(fds))

    def command(self, command, payload, *, msg_id=77, flags=0):
        self.sock.sendall(pack_message(command, payload, msg_id=msg_id, flags=flags))

    def received(self):
        """(id, command, flags, errno, payload, fds) of the next message."""
        header, fds, _, _ = socket.recv_fds(self.sock, 16, 32)
        msg_id, command, size, flags, error = uapi.HEADER.unpack(header)
        payload = self.sock.recv(size - 16, socket.MSG_WAITALL) if size > 16 else b""
        return msg_id, command, flags, error, payload, fds


@pytest.fixture
def both():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(5)
    with Client(ours, timeout=5) as client, theirs:
        yield client, Peer(theirs)


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def version_reply(caps, *, major=0, minor=0, tail=b"\0"):
    return struct.pack("<HH", major, minor) + json.dumps({"capabilities": caps}).encode() + tail


def test_the_wire_vectors_of_the_protocol(both):
    client, peer = both
    text = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}\0'
    client.send_message(Command.VERSION, struct.pack("<HH", 0, 1) + text, msg_id=1)
    client.send_message(Command.REGION_READ, uapi.REGION_ACCESS.pack(0x10, 0, 4), msg_id=2)
    state = uapi.DEVICE_FEATURE.pack(16, 0x20002) + uapi.FEATURE_STATE.pack(3, -1)
    client.send_message(Command.DEVICE_FEATURE, state, msg_id=3)
    assert peer.sock.recv(84, socket.MSG_WAITALL) == bytes.fromhex("010001005400000000000000000000000000 0100") + text
    assert peer.sock.recv(32, socket.MSG_WAITALL) == bytes.fromhex(
        "02000900200000000000000000000000 1000000000000000 00000000 04000000"
    )
    assert peer.sock.recv(32, socket.MSG_WAITALL) == bytes.fromhex(
        "03001000200000000000000000000000 10000000 02000200 03000000 ffffffff"
    )
    peer.sock.sendall(
        bytes.fromhex("02000900240000000100000000000000 1000000000000000 00000000 04000000 efbeadde")
        + bytes.fromhex("03001000100000002100000016000000")
    )
    assert client.wait_reply(2).payload[16:] == bytes.fromhex("efbeadde")
    refusal = client.wait_reply(3)
    assert (refusal.is_error, refusal.errno, refusal.payload) == (True, errno.EINVAL, b"")


def test_negotiation_offers_what_qemu_offers_and_keeps_the_limits(both):
    client, peer = both
    peer.reply(Command.VERSION, version_reply({"max_msg_fds": 8, "max_data_xfer_size": 8192}))
    version = client.negotiate()
    _, command, _, _, payload, _ = peer.received()
    assert command == Command.VERSION
    assert payload[:4] == bytes(4)
    assert payload.endswith(b"\0")
    assert json.loads(payload[4:-1])["capabilities"]["max_msg_fds"] == 16
    assert (version.max_msg_fds, version.max_data_xfer_size, version.max_dma_maps) == (8, 8192, 65535)
    peer.reply(Command.REGION_READ, uapi.REGION_ACCESS.pack(0, 2, 8192) + bytes(8192))
    peer.reply(Command.REGION_READ, uapi.REGION_ACCESS.pack(8192, 2, 5) + b"abcde")
    assert client.read_block(2, 0, 8197) == bytes(8192) + b"abcde"


@pytest.mark.parametrize(
    "reply",
    [
        version_reply({}, minor=1),
        version_reply({}, major=1),
        version_reply({}, tail=b""),
        version_reply({"max_msg_fds": 17}),
        version_reply({"max_data_xfer_size": (64 << 20) + 1}),
        version_reply({"pgsizes": 512}),
        struct.pack("<HH", 0, 0) + b"{no json\0",
        b"\0\0",
    ],
)
def test_a_version_that_qemu_refuses_is_refused(both, reply):
    client, peer = both
    peer.reply(Command.VERSION, reply)
    with pytest.raises(ProtocolError):
        client.negotiate()


def test_a_refusal_names_command_and_errno(both):
    client, peer = both
    peer.reply(Command.DMA_MAP, error=errno.EEXIST)
    with pytest.raises(ReplyError, match="DMA_MAP was answered EEXIST") as caught:
        client.dma_map(0x1000, 0x1000)
    assert (caught.value.command, caught.value.errno) == (Command.DMA_MAP, errno.EEXIST)


def test_an_error_reply_with_payload_is_consumed_whole(both):
    client, peer = both
    peer.reply(Command.REGION_READ, bytes(20), error=errno.EPERM)
    peer.reply(Command.REGION_READ, uapi.REGION_ACCESS.pack(0, 0, 4) + b"\x01\0\0\0")
    with pytest.raises(ReplyError, match="EPERM"):
        client.read(0, 0, 4)
    assert client.read(0, 0, 4) == 1


def test_replies_out_of_order_are_matched_by_id(both):
    client, peer = both
    first = client.send_message(Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(8, 0))
    second = client.send_message(Command.REGION_READ, uapi.REGION_ACCESS.pack(0, 0, 4))
    peer.reply(Command.REGION_READ, uapi.REGION_ACCESS.pack(0, 0, 4) + b"late", msg_id=second)
    assert client.has_reply(second)
    assert not client.has_reply(first)
    peer.reply(Command.DEVICE_FEATURE, b"feature!", msg_id=first)
    assert client.wait_reply(first).payload == b"feature!"
    assert client.wait_reply(second).payload[16:] == b"late"


def test_a_message_that_comes_byte_by_byte_is_whole(both):
    client, peer = both
    message = pack_message(Command.DEVICE_RESET, msg_id=0, flags=HeaderFlag.REPLY)
    msg_id = client.send_message(Command.DEVICE_RESET)
    for byte in message[:-1]:
        peer.sock.sendall(bytes([byte]))
        assert not client.has_reply(msg_id)
    peer.sock.sendall(message[-1:])
    assert client.wait_reply(msg_id).payload == b""


def test_a_reply_that_nobody_waits_for_breaks_the_connection(both):
    client, peer = both
    client.region_write(0, 0, b"posted", posted=True)
    peer.reply(Command.REGION_WRITE, msg_id=0)
    with pytest.raises(ProtocolError, match="nobody waits"):
        client.serve(1)
    _, command, flags, _, payload, _ = peer.received()
    assert (command, flags, payload[16:]) == (Command.REGION_WRITE, HeaderFlag.NO_REPLY, b"posted")


def test_a_silent_server_is_waited_for_with_a_deadline(both):
    client, _ = both
    client.timeout = 0.02
    with pytest.raises(DeadlineError, match="the reply to DEVICE_GET_INFO"):
        client.get_info()


@pytest.mark.parametrize("part", [b"", b"\0\0\x0d\0\x10"])
def test_a_closed_connection_is_named(both, part):
    client, peer = both
    client.send_message(Command.DEVICE_RESET)
    peer.sock.sendall(part)
    peer.sock.close()
    with pytest.raises(ConnectionClosedError):
        client.wait_reply(0)
    with pytest.raises(ConnectionClosedError):
        client.reset()


@pytest.mark.parametrize("size", [0, 15, 0xFFFFFFFF])
def test_a_header_with_an_impossible_size_is_refused(both, size):
    client, peer = both
    peer.reply(Command.DEVICE_RESET, size=size)
    with pytest.raises(ProtocolError, match="size"):
        client.reset()


def test_a_reply_longer_than_a_vmm_has_room_for_is_refused(both):
    client, peer = both
    peer.reply(Command.DEVICE_RESET, b"more")
    with pytest.raises(ProtocolError, match="room"):
        client.reset()


def test_the_reply_of_another_command_is_refused(both):
    client, peer = both
    peer.reply(Command.DMA_MAP)
    with pytest.raises(ProtocolError, match="calls itself DMA_MAP"):
        client.reset()


def test_fds_go_out_with_their_message_and_stay_ours(both):
    client, peer = both
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    peer.reply(Command.DEVICE_SET_IRQS)
    client.set_irq_eventfds(0, 0, [fd])
    *_, payload, fds = peer.received()
    assert payload == uapi.IRQ_SET.pack(20, 0x24, 0, 0, 1)
    os.eventfd_write(fds[0], 3)
    assert os.eventfd_read(fd) == 3
    os.close(fd)
    os.close(fds[0])


def test_many_eventfds_go_out_in_messages_of_the_negotiated_size(both):
    client, peer = both
    peer.reply(Command.VERSION, version_reply({"max_msg_fds": 8}))
    client.negotiate()
    peer.received()
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    for _ in range(3):
        peer.reply(Command.DEVICE_SET_IRQS)
    client.set_irq_eventfds(2, 0, [fd] * 17)
    shapes = []
    for _ in range(3):
        *_, payload, fds = peer.received()
        shapes.append((*uapi.IRQ_SET.unpack(payload)[2:], len(fds)))
        for received in fds:
            os.close(received)
    os.close(fd)
    assert shapes == [(2, 0, 8, 8), (2, 8, 8, 8), (2, 16, 1, 1)]


def test_unwanted_fds_of_a_reply_are_closed_and_refused(both):
    client, peer = both
    before = open_fds()
    with open(os.devnull) as null:
        peer.reply(Command.DEVICE_RESET, fds=[null.fileno()] * 3)
    with pytest.raises(ProtocolError, match="3 fds"):
        client.reset()
    assert open_fds() == before


def test_fds_of_messages_that_nobody_took_are_closed_with_the_client():
    before = open_fds()
    ours, theirs = socket.socketpair()
    with theirs, Client(ours) as client, open(os.devnull) as null:
        peer = Peer(theirs)
        first = client.send_message(Command.DEVICE_RESET)
        peer.reply(Command.DEVICE_RESET, msg_id=first, fds=[null.fileno()])
        socket.send_fds(theirs, [b"\0\0"], [null.fileno()])
        assert client.has_reply(first)
        client.serve(0)
    assert open_fds() == before


def region_info(argsz, flags, index, cap_offset, size, offset):
    return uapi.REGION_INFO.pack(argsz, flags, index, cap_offset, size, offset)


def test_region_info_is_asked_again_for_its_sparse_areas(both):
    client, peer = both
    flags = 0xF
    caps = uapi.CAP_HEADER.pack(1, 1, 0) + uapi.SPARSE_HEADER.pack(2, 0)
    caps += uapi.SPARSE_AREA.pack(0x1000, 0x1000) + uapi.SPARSE_AREA.pack(0x3000, 0x2000)
    with open(os.devnull) as null:
        peer.reply(Command.DEVICE_GET_REGION_INFO, region_info(80, flags, 2, 32, 0x8000, 0), fds=[null.fileno()])
        peer.reply(
            Command.DEVICE_GET_REGION_INFO, region_info(80, flags, 2, 32, 0x8000, 0x4000) + caps, fds=[null.fileno()]
        )
    before = open_fds()
    info = client.get_region_info(2)
    assert open_fds() == before + 1
    os.close(info.fd)
    assert (info.index, info.size, info.flags, info.fd_offset) == (2, 0x8000, flags, 0x4000)
    assert info.areas == (MmapArea(0x1000, 0x1000), MmapArea(0x3000, 0x2000))
    assert [uapi.REGION_INFO.unpack(peer.received()[4])[0] for _ in range(2)] == [32, 80]


@pytest.mark.parametrize(
    "reply",
    [
        region_info(80, 8, 0, 0, 0x1000, 0),
        region_info(32, 8, 0, 32, 0x1000, 0),
        region_info(80, 8, 0, 76, 0x1000, 0),
        bytes(16),
    ],
)
def test_region_info_that_qemu_refuses_is_refused(both, reply):
    client, peer = both
    peer.reply(Command.DEVICE_GET_REGION_INFO, reply)
    with pytest.raises(ProtocolError):
        client.get_region_info(0)


def test_a_chain_of_region_capabilities_in_a_circle_is_refused(both):
    client, peer = both
    info = region_info(48, 8, 0, 32, 0x1000, 0)
    peer.reply(Command.DEVICE_GET_REGION_INFO, info)
    peer.reply(Command.DEVICE_GET_REGION_INFO, info + uapi.CAP_HEADER.pack(9, 1, 40) + uapi.CAP_HEADER.pack(9, 1, 32))
    with pytest.raises(ProtocolError, match="chain"):
        client.get_region_info(0)


def test_device_and_irq_info(both):
    client, peer = both
    peer.reply(Command.DEVICE_GET_INFO, uapi.DEVICE_INFO.pack(16, 3, 9, 5))
    peer.reply(Command.DEVICE_GET_IRQ_INFO, uapi.IRQ_INFO.pack(16, 9, 2, 64))
    info = client.get_info()
    assert (info.can_reset, info.num_regions, info.num_irqs) == (True, 9, 5)
    assert client.get_irq_info(2) == IrqInfo(2, 64, 9)


class Ram:
    def __init__(self):
        self.written = []

    def dma_read(self, iova, length):
        if iova != 0x1000:
            raise OSError(errno.EFAULT, "nothing there")
        return b"x" * length

    def dma_write(self, iova, data):
        self.written.append((iova, data))


def test_commands_of_the_server_are_served_while_a_reply_is_waited_for(both):
    client, peer = both
    client.memory = Ram()
    peer.command(Command.DMA_READ, uapi.DMA_ACCESS.pack(0x1000, 8), msg_id=0)
    peer.command(Command.DMA_READ, uapi.DMA_ACCESS.pack(0x2000, 8), msg_id=1)
    peer.command(Command.DMA_WRITE, uapi.DMA_ACCESS.pack(0x3000, 4) + b"data", msg_id=2)
    peer.command(Command.DMA_WRITE, uapi.DMA_ACCESS.pack(0x3000, 5) + b"data", msg_id=3)
    peer.command(Command.DMA_READ, uapi.DMA_ACCESS.pack(0x1000, 1 << 21), msg_id=4)
    peer.command(Command.VERSION, b"", msg_id=5)
    peer.command(Command.DMA_WRITE, uapi.DMA_ACCESS.pack(0x4000, 1) + b"p", flags=HeaderFlag.NO_REPLY)
    peer.reply(Command.DEVICE_RESET)
    client.reset()
    assert peer.received()[:2] == (0, Command.DEVICE_RESET)
    good, bad = int(HeaderFlag.REPLY), int(HeaderFlag.REPLY | HeaderFlag.ERROR)
    answers = [peer.received()[:5] for _ in range(6)]
    assert answers == [
        (0, Command.DMA_READ, good, 0, uapi.DMA_ACCESS.pack(0x1000, 8) + b"x" * 8),
        (1, Command.DMA_READ, bad, errno.EFAULT, b""),
        (2, Command.DMA_WRITE, good, 0, uapi.DMA_ACCESS.pack(0x3000, 4)),
        (3, Command.DMA_WRITE, bad, errno.EINVAL, b""),
        (4, Command.DMA_READ, bad, errno.E2BIG, b""),
        (5, Command.VERSION, bad, errno.ENOSYS, b""),
    ]
    assert client.memory.written == [(0x3000, b"data"), (0x4000, b"p")]
    assert (client.dma_reads, client.dma_writes) == (2, 2)


def test_a_raw_client_sees_the_commands_of_the_server(both):
    client, peer = both
    peer.command(Command.DMA_READ, uapi.DMA_ACCESS.pack(0, 8), msg_id=9)
    message = client.recv_message()
    assert (message.is_reply, message.msg_id, message.command) == (False, 9, Command.DMA_READ)


def test_a_wait_for_an_eventfd_serves_the_server_meanwhile(both):
    client, peer = both
    client.memory = Ram()
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    peer.command(Command.DMA_READ, uapi.DMA_ACCESS.pack(0x1000, 1))
    assert not client.wait_readable(fd, 0.02)
    assert client.dma_reads == 1
    os.eventfd_write(fd, 1)
    assert client.wait_readable(fd)
    os.close(fd)


def test_a_send_that_blocks_takes_in_what_the_server_sends(both):
    client, peer = both
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client.timeout = 0.05
    msg_id = client.send_message(Command.DEVICE_RESET)
    peer.reply(Command.DEVICE_RESET)
    with pytest.raises(DeadlineError, match="to take a message"):
        client.send_raw(bytes(1 << 20))
    assert client.has_reply(msg_id)


def test_migration_messages(both):
    client, peer = both
    state = uapi.DEVICE_FEATURE.pack(16, 0x20002) + uapi.FEATURE_STATE.pack(MigState.STOP_COPY, -1)
    peer.reply(Command.DEVICE_FEATURE, state)
    client.set_mig_state(MigState.STOP_COPY)
    assert peer.received()[4] == state
    peer.reply(Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(16, 0x10002) + uapi.FEATURE_STATE.pack(3, -1))
    assert client.mig_state() == MigState.STOP_COPY
    peer.received()
    # a server may send as many bytes as were asked for: the size says how many count
    peer.reply(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(11, 3) + b"abc" + bytes(61))
    assert client.mig_data_read(64) == b"abc"
    assert peer.received()[4] == uapi.MIG_DATA.pack(72, 64)
    peer.reply(Command.MIG_DATA_WRITE)
    client.mig_data_write(b"abc")
    assert peer.received()[4] == uapi.MIG_DATA.pack(11, 3) + b"abc"
    peer.reply(Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(16, 0x10009) + struct.pack("<Q", 12345))
    assert client.mig_data_size() == 12345


@pytest.mark.parametrize("answer", [(12, 4, b"abc"), (80, 72, bytes(72)), (8, 3, b"abc")])
def test_migration_data_that_contradicts_itself_is_refused(both, answer):
    client, peer = both
    argsz, size, data = answer
    peer.reply(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(argsz, size) + data)
    with pytest.raises(ProtocolError):
        client.mig_data_read(64)


def test_a_state_answered_with_a_data_fd_is_refused(both):
    client, peer = both
    peer.reply(Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(16, 0x10002) + uapi.FEATURE_STATE.pack(3, 0))
    with pytest.raises(ProtocolError, match="data_fd 0"):
        client.mig_state()


def test_features_that_are_not_there(both):
    client, peer = both
    peer.reply(Command.DEVICE_FEATURE, error=errno.ENOTTY)
    peer.reply(Command.DEVICE_FEATURE, error=errno.EINVAL)
    peer.reply(Command.DEVICE_FEATURE, error=errno.EIO)
    assert client.migration_flags() == 0
    assert not client.feature_probe(6)
    with pytest.raises(ReplyError, match="EIO"):
        client.feature_probe(6)


def test_dirty_page_logging(both):
    client, peer = both
    request = uapi.FEATURE_LOGGING_START.pack(4096, 2, 0) + struct.pack("<4Q", 0, 0x10000, 0x100000, 0x1000)
    answer = uapi.FEATURE_LOGGING_START.pack(8192, 2, 0) + request[16:]
    peer.reply(Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(56, 0x20006) + answer)
    assert client.dma_logging_start([(0, 0x10000), (0x100000, 0x1000)]) == 8192
    assert peer.received()[4] == uapi.DEVICE_FEATURE.pack(8 + len(request), 0x20006) + request
    head = uapi.FEATURE_LOGGING_REPORT.pack(0x10000, 65 * 4096, 4096)
    bitmap = struct.pack("<QQ", 1 << 63 | 2, 1)
    peer.reply(Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(48, 0x10008) + head + bitmap)
    answered = client.dma_logging_report(0x10000, 65 * 4096)
    assert list(dirty_pages(answered, 0x10000)) == [0x11000, 0x10000 + 63 * 4096, 0x10000 + 64 * 4096]
    assert peer.received()[4] == uapi.DEVICE_FEATURE.pack(8 + 24 + 16, 0x10008) + head


def test_a_full_queue_of_a_listening_socket_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("queue.sock")
        listener.listen(0)
        with Client.connect("queue.sock"):
            begun = time.monotonic()
            with pytest.raises(BlockingIOError):
                Client.connect("queue.sock", timeout=0.1)
            assert time.monotonic() - begun >= 0.09


def test_a_socket_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        Client.connect(tmp_path / "nobody.sock")
