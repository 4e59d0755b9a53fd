"""What a client can make the server hold in memory while the session is busy."""

import pytest

from tests.protocol.served import deaf_feature, resident
from vfu_server import uapi
from vfu_server.errors import DeadlineError
from vfu_server.uapi import Command, HeaderFlag


@pytest.fixture
def busy(served, client):
    """The client, with a message that the session has not answered."""
    deaf_feature(client)
    served.message(Command.DEVICE_FEATURE)
    return client


def test_held_data_does_not_fill_the_servers_memory(served, busy):
    """A hostile client may send migration data all day while a state change is under way."""
    before = resident()
    busy.timeout = 0.2
    chunk = uapi.MIG_DATA.pack(8 + (1 << 20), 1 << 20) + bytes(1 << 20)
    sent = 0
    try:
        while sent < 96:
            busy.send_message(Command.MIG_DATA_WRITE, chunk, flags=HeaderFlag.NO_REPLY)
            sent += 1
    except DeadlineError:
        pass
    assert resident() - before < 32 << 20, f"after {sent} MiB of held data"
    served.context.reply()
