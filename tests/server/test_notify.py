"""What the service manager hears, on a real datagram socket."""

import os
import socket

import pytest
import trio

from vfu_server.notify import Notifier


@pytest.fixture
def manager(folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "notify"))
        sock.settimeout(5)
        yield sock


def environ(manager, **more) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), "HOME": "/", **more}


def test_ready_status_and_stopping(manager) -> None:
    variables = environ(manager)
    notifier = Notifier.from_environ(variables)
    assert variables == {"HOME": "/"}
    notifier.ready("serving: nic0\nREADY=0")
    assert manager.recv(1000) == b"READY=1\nSTATUS=serving: nic0 READY=0"
    notifier.status("serving: nic0; lost: nic1")
    assert manager.recv(1000) == b"STATUS=serving: nic0; lost: nic1"
    notifier.stopping()
    assert manager.recv(1000) == b"STOPPING=1\nSTATUS=bringing devices to rest"


def test_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0vfu-test-{os.getpid()}")
        sock.settimeout(5)
        Notifier.from_environ({"NOTIFY_SOCKET": f"@vfu-test-{os.getpid()}"}).ready("x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


def test_nobody_to_tell(folder) -> None:
    Notifier.from_environ({}).ready("x")
    Notifier.from_environ({"NOTIFY_SOCKET": str(folder / "gone")}).ready("x")
    trio.run(Notifier.from_environ({}).watchdog)


def test_manager_that_does_not_read(manager) -> None:
    notifier = Notifier.from_environ(environ(manager))
    for _ in range(5000):
        notifier.status("x" * 500)


def test_unknown_kind_of_address(caplog) -> None:
    Notifier.from_environ({"NOTIFY_SOCKET": "vsock:2:1234"}).ready("x")
    assert "NOTIFY_SOCKET=vsock:2:1234 is neither a path nor an abstract name" in caplog.text


@pytest.mark.parametrize("mine", [{}, {"WATCHDOG_PID": str(os.getpid())}])
def test_watchdog_is_fed_twice_an_interval(manager, mine) -> None:
    notifier = Notifier.from_environ(environ(manager, WATCHDOG_USEC="100000", **mine))

    async def feed() -> float:
        with trio.move_on_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(notifier.watchdog)
                start = trio.current_time()
                for _ in range(5):
                    assert await trio.to_thread.run_sync(manager.recv, 100) == b"WATCHDOG=1"
                nursery.cancel_scope.cancel()
                return trio.current_time() - start
        raise AssertionError("not fed")

    assert 0.15 < trio.run(feed) < 1.0


@pytest.mark.parametrize(
    "variables",
    [{"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "-5"}, {}],
)
def test_watchdog_is_not_for_us(manager, variables) -> None:
    notifier = Notifier.from_environ(environ(manager, **variables))
    assert notifier.watchdog_seconds == 0
    trio.run(notifier.watchdog)
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(100)
