"""A plugin whose coroutine does not end when it is cancelled: the device is in ERROR, named, and nobody waits for ever.

Once it ends after all, a reset brings the device back.
"""

import errno
import socket
import threading

import pytest
import trio

from tests.data_plane.rig import until
from tests.plugins_synthetic.device import Shape, SyntheticDevice
from tests.plugins_synthetic.in_process import InProcess
from vfu_server import session_task, uapi
from vfu_server.testing import Client, ReplyError, migrate, save
from vfu_server.testing.failing import FailingDevice, Stuck
from vfu_server.uapi import Command, MigState

SECONDS = 60.0
SHAPE = Shape(4096, 4096, pre_copy=True)
RUNNING, STOP, STOP_COPY, RESUMING, PRE_COPY, ERROR = (
    MigState.RUNNING,
    MigState.STOP,
    MigState.STOP_COPY,
    MigState.RESUMING,
    MigState.PRE_COPY,
    MigState.ERROR,
)


class Endless:
    """A wait that ends when a test says so."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._event: trio.Event
        self._token: trio.lowlevel.TrioToken

    async def __call__(self) -> None:
        self._event, self._token = trio.Event(), trio.lowlevel.current_trio_token()
        self.begun.set()
        await self._event.wait()

    def release(self) -> None:
        """The end, after all."""
        self._token.run_sync_soon(self._event.set)


@pytest.fixture
def served(monkeypatch):
    """A device that can be told to fail, and its wait."""
    monkeypatch.setattr(session_task, "END_PATIENCE", 0.7)
    made = InProcess(SHAPE, device_type=lambda host, shape: FailingDevice(SyntheticDevice(host, shape)))
    made.endless = Endless()
    yield made
    if made.endless.begun.is_set():
        made.endless.release()
    made.close()


def refused(call, *arguments) -> int:
    with pytest.raises(ReplyError) as caught:
        call(*arguments)
    return caught.value.errno


def stuck_in_save(served, client) -> None:
    served.device.order("save", Stuck(served.endless))
    client.set_mig_state(STOP_COPY)
    assert served.endless.begun.wait(SECONDS)


def stuck_in_load(served, client) -> None:
    client.set_mig_state(STOP_COPY)
    stream = b"".join(save(client))
    client.set_mig_state(STOP)
    client.set_mig_state(RESUMING)
    served.device.order("load", Stuck(served.endless))
    # A small write is answered when the plugin has taken it: whoever waits for that has gone before.
    client.send_message(
        Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(uapi.MIG_DATA.size + len(stream), len(stream)) + stream
    )
    assert served.endless.begun.wait(SECONDS)


def comes_back(served, client) -> None:
    """The wait ends after all, and a reset brings the device back."""
    served.endless.release()
    until(lambda: not served.session._migration._save.task.stuck and not served.session._migration._load.task.stuck)
    client.reset()
    assert client.mig_state() is RUNNING
    client.set_mig_state(STOP_COPY)
    assert b"".join(save(client))
    client.set_mig_state(STOP)
    client.set_mig_state(RUNNING)


@pytest.mark.parametrize("pre_copy", [False, True])
def test_a_save_that_does_not_end_puts_the_device_into_error(served, caplog, pre_copy):
    with served.connect(timeout=SECONDS) as client:
        if pre_copy:
            served.device.order("save", Stuck(served.endless))
            client.set_mig_state(PRE_COPY)
            assert served.endless.begun.wait(SECONDS)
        else:
            stuck_in_save(served, client)
        assert refused(client.set_mig_state, RUNNING if pre_copy else STOP) == errno.EIO
        assert client.mig_state() is ERROR
        assert "the plugin's save goes on 0.7 s after it was cancelled" in caplog.text
        for _ in range(2):
            assert refused(client.reset) == errno.ETIMEDOUT
            assert client.mig_state() is ERROR
        assert served.session.statistics().overruns == 1
        comes_back(served, client)
        assert "the plugin's save has ended at last" in caplog.text


@pytest.mark.parametrize("stuck", [stuck_in_save, stuck_in_load])
def test_the_next_client_is_told_and_served_when_it_has_ended(served, caplog, stuck):
    with served.connect(timeout=SECONDS) as client:
        stuck(served, client)
    until(lambda: served.session.refused, "the device is not given up", SECONDS)
    what = "save" if stuck is stuck_in_save else "load"
    assert f"could not be brought back after its last client: the plugin's {what} goes on" in served.session.refused
    assert f"the plugin's {what} goes on 0.7 s after it was cancelled" in caplog.text
    assert served.session.mig_state is ERROR
    assert served.session.statistics().overruns == 1
    ours, theirs = socket.socketpair()
    served.on_trio(served._send.send_nowait, theirs.detach())
    with Client(ours, timeout=SECONDS) as client, pytest.raises(ReplyError) as caught:
        client.negotiate()
    assert caught.value.errno == errno.ENODEV
    served.endless.release()
    with served.connect(timeout=SECONDS) as client:
        assert client.mig_state() is RUNNING
        client.set_mig_state(STOP)
        client.set_mig_state(RUNNING)
        comes_back_again = InProcess(SHAPE)
        try:
            with comes_back_again.connect(timeout=SECONDS) as other:
                migrate(client, other, pre_copy=False)
        finally:
            comes_back_again.close()
