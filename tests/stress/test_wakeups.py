"""The pump sleeps while nothing is there to do, whatever was told to it before."""

import os
import select
from pathlib import Path

import pytest
import trio

from tests.protocol.served import REGISTERS, Served, access
from vfu_server import uapi
from vfu_server.testing.wire import pack_message
from vfu_server.uapi import Command

SOME_MS = 300
"""How long it is watched."""


@pytest.fixture
def served():
    served = Served()
    yield served
    served.close()


def pump_ms():
    """Milliseconds of processor time that the pump's thread has used."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "vfu-pump\n"]
    assert len(tasks) == 1
    return int((tasks[0] / "schedstat").read_text().split()[0]) / 1e6


def load(served, client):
    served.context.ring.open_load()
    client.mig_data_write(bytes(4096))
    assert len(trio.run(served.context.ring.receive)) == 4096


def save(served, client):
    served.context.ring.open_save(pre_copy=False)
    trio.run(served.context.ring.send, bytes(4096))
    assert client.mig_data_read(4096) == bytes(4096)


@pytest.mark.parametrize("before", [load, save])
def test_half_a_message_is_waited_for_asleep(served, before):
    """The ring's signals were left in the pump's eventfd, and every wait for the rest of a message ended at once."""
    message = pack_message(Command.REGION_READ, access(0, REGISTERS, 4), msg_id=7)
    with served.connect() as client:
        before(served, client)
        os.write(client.sock.fileno(), message[:20])
        used = pump_ms()
        assert select.select([client.sock], [], [], SOME_MS / 1000) == ([], [], [])
        assert pump_ms() - used < SOME_MS / 10
        os.write(client.sock.fileno(), message[20:])
        assert select.select([client.sock], [], [], 5)[0]
        assert len(os.read(client.sock.fileno(), 64)) == uapi.HEADER.size + uapi.REGION_ACCESS.size + 4
