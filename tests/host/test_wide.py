"""16 bytes to a device behind a socket: one message, or the halves as an emulator makes them where that is refused."""

import contextlib
import errno
import os
import socket

import pytest

from tests.unit.peer_device import PeerDevice
from vfu_server.libvfio_user.client import ClientDoor
from vfu_server.uapi import Command

DATA = bytes(range(16))
WHOLE, LOW, HIGH = (
    (Command.REGION_WRITE, (2, 0x300, 16)),
    (Command.REGION_WRITE, (2, 0x300, 8)),
    (
        Command.REGION_WRITE,
        (2, 0x308, 8),
    ),
)


@contextlib.contextmanager
def connected():
    ours, theirs = socket.socketpair()
    peer = PeerDevice(theirs)
    door = ClientDoor(ours.detach())
    try:
        yield door, peer
    finally:
        door.close()
        peer.close()


def test_one_message():
    with connected() as (door, peer):
        door.write_wide(2, 0x300, DATA)
        assert peer.log == [WHOLE]


def test_two_halves_where_one_is_refused():
    with connected() as (door, peer):
        peer.refuse[WHOLE] = errno.EINVAL
        door.write_wide(2, 0x300, DATA)
        assert peer.log == [WHOLE, LOW, HIGH]


def test_two_halves_where_a_message_has_no_room():
    with connected() as (door, peer):
        door.set_max_transfer(8)
        door.write_wide(2, 0x300, DATA)
        assert peer.log == [LOW, HIGH]


@pytest.mark.parametrize(
    ("refuse", "log"), [({WHOLE: errno.EIO}, [WHOLE]), ({WHOLE: errno.EINVAL, LOW: errno.EIO}, [WHOLE, LOW])]
)
def test_another_refusal_is_told(refuse, log):
    with connected() as (door, peer):
        peer.refuse |= refuse
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as failed:
            door.write_wide(2, 0x300, DATA)
        assert failed.value.errno == errno.EIO
        assert peer.log == log
