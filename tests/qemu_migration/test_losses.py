"""A server that is lost, refuses, or cannot migrate, and the bugs that made QEMU die of it: the guest is never lost."""

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.qemu_migration.edu_guest import BAR, PAGE, copy, set_up, until
from tests.qemu_migration.monitor import QmpError
from tests.qemu_migration.moves import move, prepare, start
from tests.qemu_migration.side import SLOT, Side, serving, side, socket_of
from tests.server.programs import Server
from tools.qemu_root import QemuRoot

DATA = bytes(range(256)) * (PAGE // 256)
INCOMING = ("-incoming", "defer")


def freeze(server: Server) -> None:
    """Stop the process, and wait until it is."""
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)


def test_the_destinations_server_dies_in_the_middle(qemu: QemuRoot, tmp_path: Path) -> None:
    with side(qemu, tmp_path / "a") as first, side(qemu, tmp_path / "b", *INCOMING) as second:
        prepare(first, second, max_bandwidth=1 << 20)
        set_up(first.guest)
        first.guest.store(0x100000, DATA)
        start(first, second)
        assert first.monitor.wait_migration("active")["status"] == "active"
        assert second.server
        second.server.process.kill()
        second.server.process.wait()
        first.monitor.execute("migrate-set-parameters", max_bandwidth=0)
        assert first.monitor.wait_migration()["status"] == "failed"
        assert first.status() == "running"
        copy(first.guest, 0x100000, 0x500000, PAGE)
        assert first.guest.load(0x500000, PAGE) == DATA
        with side(qemu, tmp_path / "c", *INCOMING) as third:
            prepare(first, third)
            move(first, third)
            copy(third.guest, 0x500000, 0x600000, PAGE)
            assert third.guest.load(0x600000, PAGE) == DATA


def test_the_sources_server_dies_in_the_middle(qemu: QemuRoot, tmp_path: Path) -> None:
    """The device is gone then, with its state; the machine is not, and nothing says that it has moved."""
    with side(qemu, tmp_path / "a") as first, side(qemu, tmp_path / "b", *INCOMING) as second:
        prepare(first, second, max_bandwidth=1 << 20)
        set_up(first.guest)
        start(first, second)
        assert first.monitor.wait_migration("active")["status"] == "active"
        assert first.server
        first.server.process.kill()
        first.server.process.wait()
        until(lambda: first.guest.read(BAR, 4) == 0xFFFFFFFF, "a dead device does not read as all ones")
        first.monitor.execute("migrate-set-parameters", max_bandwidth=0)
        assert first.monitor.wait_migration()["status"] == "failed"
        assert first.status() == "running"
        first.guest.store(0x100000, b"alive")
        assert first.guest.load(0x100000, 5) == b"alive"
        first.monitor.execute("system_reset")
        first.monitor.wait_event("RESET")
        assert first.alive


def test_another_device_at_the_destination_is_refused(qemu: QemuRoot, tmp_path: Path) -> None:
    """The server's stream says what it is; QEMU would take any device with the same registers."""
    (tmp_path / "b").mkdir()
    with ExitStack() as stack:
        first = stack.enter_context(side(qemu, tmp_path / "a"))
        server = stack.enter_context(serving(tmp_path / "b", "--dirty-tracking", "all", model="ioat"))
        second = stack.enter_context(Side(qemu, tmp_path / "b", *INCOMING, server=server))
        prepare(first, second)
        set_up(first.guest)
        start(first, second)
        assert first.monitor.wait_migration()["status"] == "failed"
        if first.status() == "postmigrate":
            first.monitor.execute("cont")
        assert first.status() == "running"
        assert first.guest.read(BAR, 4) == 0x010000ED
        server.wait_log("refused", 60)


@pytest.mark.parametrize(
    ("options", "properties", "reason"),
    [
        ((), {}, "dirty tracking"),
        (("--dirty-tracking", "all"), {"enable-migration": "off"}, "disabled"),
    ],
)
def test_where_it_cannot_be_it_is_refused(
    qemu: QemuRoot, tmp_path: Path, options: tuple[str, ...], properties: dict[str, object], reason: str
) -> None:
    with side(qemu, tmp_path / "a", options=options, device=properties) as first:
        set_up(first.guest)
        assert reason in first.monitor.execute("query-migrate")["blocked-reasons"][0]
        with pytest.raises(QmpError, match=reason):
            first.monitor.execute("migrate", uri=f"file:{tmp_path / 'state'}")
        assert first.guest.read(BAR, 4) == 0x010000ED


def test_without_dirty_tracking_if_the_user_says_so(qemu: QemuRoot, tmp_path: Path) -> None:
    options = {"options": (), "device": {"enable-migration": "on"}}
    with side(qemu, tmp_path / "a", **options) as first, side(qemu, tmp_path / "b", *INCOMING, **options) as second:
        prepare(first, second)
        set_up(first.guest)
        first.guest.store(0x100000, DATA)
        copy(first.guest, 0x100000, 0x500000, PAGE)
        move(first, second)
        assert second.guest.load(0x500000, PAGE) == DATA
        copy(second.guest, 0x500000, 0x600000, PAGE)
        assert second.guest.load(0x600000, PAGE) == DATA


def test_one_late_reply_does_not_spoil_the_connection(qemu: QemuRoot, tmp_path: Path) -> None:
    """The server sleeps for longer than QEMU waits for an access; afterwards, all is as before."""
    with side(qemu, tmp_path / "a") as first:
        set_up(first.guest)
        assert first.server
        freeze(first.server)
        assert first.guest.read(BAR, 4) == 0xFFFFFFFF
        first.server.process.send_signal(signal.SIGCONT)
        until(lambda: first.guest.read(BAR, 4) == 0x010000ED, "the device does not come back")
        first.guest.write(BAR + 4, 4, 0x12345678)
        assert first.guest.read(BAR + 4, 4) == 0xEDCBA987
        assert "bad header size" not in first.log


def test_a_device_with_msix_is_unplugged_and_plugged(qemu: QemuRoot, tmp_path: Path) -> None:
    """Of the models it is ioat that has MSI-X."""
    (tmp_path / "a").mkdir()
    with ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path / "a", model="ioat"))
        port = ("-device", "pcie-root-port,id=rp1,chassis=1,addr=0x5")
        first = stack.enter_context(Side(qemu, tmp_path / "a", *port, server=None))
        address = {"type": "unix", "path": str(socket_of(tmp_path / "a"))}
        for _ in range(3):
            described = {"driver": "vfio-user-pci", "id": "ioat", "bus": "rp1", "socket": address}
            first.monitor.execute("device_add", **json.loads(json.dumps(described)))
            first.monitor.execute("device_del", id="ioat")
            first.monitor.execute("system_reset")
            first.monitor.wait_event("DEVICE_DELETED", device="ioat")
            assert first.alive
            server.wait_log("client disconnected", 60)
            server.log = ""


def test_a_server_that_dies_with_requests_unread(qemu: QemuRoot, tmp_path: Path) -> None:
    """Its end of the connection is reset then, rather than closed."""
    with side(qemu, tmp_path / "a") as first:
        set_up(first.guest)
        assert first.server
        freeze(first.server)
        first.guest.read(BAR, 4)
        first.server.process.kill()
        first.server.process.wait()
        until(lambda: first.guest.read(BAR, 4) == 0xFFFFFFFF, "a dead device does not read as all ones")
        assert first.guest.config_read(SLOT, 0, 4) in (0xFFFFFFFF, 0x11E81234)
        assert first.alive
