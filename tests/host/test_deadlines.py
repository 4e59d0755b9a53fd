"""Deadlines lie inside one another: what is waited for in a thread ends before whoever waits there loses patience."""

import errno
import socket
import threading

import pytest
from trio.testing import trio_test

from tests.unit.peer_device import PeerDevice
from vfu_server import server, server_stage, session, session_intake, session_migration
from vfu_server.errors import DeviceGoneError, HostError
from vfu_server.host import vfio_user
from vfu_server.host.vfio_user import VfioUserHost

CLIENT = 5.0
"""Seconds after which QEMU gives its connection up."""


def test_they_are_in_order():
    assert vfio_user.RESET_TIMEOUT < session_migration.RESET_DEADLINE <= session.RECLAIM_DEADLINE
    assert vfio_user.FEATURE_TIMEOUT < session_migration.ARC_DEADLINE
    assert vfio_user.FEATURE_TIMEOUT < session_intake.SECTION_DEADLINE < CLIENT
    assert session_migration.ARC_DEADLINE + session_migration.UNDO_DEADLINE < CLIENT
    assert session_migration.RESET_DEADLINE < CLIENT
    assert server_stage.CLOSE_DEADLINE < server.FORCE_AFTER < server.STUCK_AFTER


class Mute(PeerDevice):
    """A device's server that does not answer one command until the test is over."""

    over: threading.Event
    mute = ""

    def _serve_one(self, command, payload, fds):
        if command.name == self.mute:
            self.over.wait(60.0)
        return super()._serve_one(command, payload, fds)


@pytest.fixture
def peer(tmp_path):
    """One that listens, and its path."""
    path, over, served = str(tmp_path / "p"), threading.Event(), []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            device = Mute(sock)
            device.over = over
            served.append(device)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path, served
        over.set()
        thread.join()
    for device in served:
        device.close()


@trio_test
async def test_a_reset_that_is_not_answered_fails_by_name_and_the_device_is_not_lost(peer, monkeypatch):
    monkeypatch.setattr(vfio_user, "RESET_TIMEOUT", 0.2)
    path, served = peer
    host = await VfioUserHost.open(path)
    served[0].mute = "DEVICE_RESET"
    with pytest.raises(HostError) as failed:
        await host.reset()
    assert failed.value.errno == errno.ETIMEDOUT
    assert not isinstance(failed.value, DeviceGoneError)
    assert failed.value.__notes__ == ["in DEVICE_RESET"]
    await host.aclose()
