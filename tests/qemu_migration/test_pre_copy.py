"""A device with megabytes of state and pre-copy, moved by QEMU: rounds, sizes, switch-over, P2P, large messages."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.plugins_synthetic.device import MAGIC, REG_CHANGE_MANY, REG_DIGEST, REG_MAGIC
from tests.plugins_synthetic.plugin import install_synthetic, options
from tests.qemu.qtest import Qtest
from tests.qemu_migration.edu_guest import BAR
from tests.qemu_migration.monitor import SECONDS
from tests.qemu_migration.moves import move, prepare, start
from tests.qemu_migration.side import SLOT, Side, socket_of
from tests.server.programs import Server
from tools.qemu_root import QemuRoot

SIZE = 24 << 20
INCOMING = ("-incoming", "defer")


@contextmanager
def synthetic(qemu: QemuRoot, folder: Path, *arguments: str, **shape: float) -> Iterator[Side]:
    """A side whose device is the synthetic one."""
    folder.mkdir()
    site = folder / "site"
    install_synthetic(site)
    command = [*options(**({"size": SIZE} | shape)), "--dirty-tracking", "all", "--socket-path", socket_of(folder)]
    with ExitStack() as stack:
        server = stack.enter_context(Server(*command, sites=[site], TMPDIR=str(folder)))
        server.wait_log("listening at", SECONDS)
        yield stack.enter_context(Side(qemu, folder, *arguments, server=server))


def set_up(guest: Qtest) -> None:
    guest.config_write(SLOT, 0x10, 4, BAR)
    guest.config_write(SLOT, 0x04, 2, 0x6)
    assert guest.read(BAR + REG_MAGIC, 4) == MAGIC
    guest.write(BAR + REG_CHANGE_MANY, 4, 100)


def digest(guest: Qtest) -> int:
    return guest.read(BAR + REG_DIGEST, 4) | guest.read(BAR + REG_DIGEST + 4, 4) << 32


@pytest.mark.parametrize("channels", [0, 2], ids=["one channel", "multifd"])
@pytest.mark.parametrize("shape", [{}, {"p2p": 1}, {"pre_copy": 1}, {"pre_copy": 1, "p2p": 1}], ids=str)
def test_every_set_of_features_is_moved(qemu: QemuRoot, tmp_path: Path, shape: dict[str, float], channels: int) -> None:
    capabilities = {"multifd": True} if channels else {}
    with (
        synthetic(qemu, tmp_path / "a", **shape) as first,
        synthetic(qemu, tmp_path / "b", *INCOMING, **shape) as second,
    ):
        prepare(first, second, capabilities=capabilities, **({"multifd_channels": channels} if channels else {}))
        set_up(first.guest)
        before = digest(first.guest)
        found = move(first, second)
        assert found["vfio"]["transferred"] >= SIZE
        assert digest(second.guest) == before
        assert first.server
        assert ("-> PRE_COPY" in first.server.wait_log("STOP_COPY -> STOP", SECONDS)) == ("pre_copy" in shape)
        assert "warning" not in first.server.log


def test_what_changes_in_pre_copy_is_sent_again(qemu: QemuRoot, tmp_path: Path) -> None:
    shape = {"pre_copy": 1, "p2p": 1}
    with (
        synthetic(qemu, tmp_path / "a", **shape) as first,
        synthetic(qemu, tmp_path / "b", *INCOMING, **shape) as second,
    ):
        prepare(first, second, downtime_limit=1)
        set_up(first.guest)
        start(first, second)
        assert first.server
        first.server.wait_log("-> PRE_COPY", SECONDS)
        while first.monitor.wait_migration("active").get("vfio", {}).get("transferred", 0) < SIZE:
            first.guest.write(BAR + REG_CHANGE_MANY, 4, 1)
        first.guest.write(BAR + REG_CHANGE_MANY, 4, 5)
        before = digest(first.guest)
        first.monitor.execute("migrate-set-parameters", downtime_limit=60_000)
        found = first.monitor.wait_migration()
        assert found["status"] == "completed"
        assert found["vfio"]["transferred"] > SIZE
        second.monitor.wait_event("RESUME")
        assert digest(second.guest) == before


def test_switch_over_waits_for_the_destination(qemu: QemuRoot, tmp_path: Path) -> None:
    """The capability needs what QEMU asks by GET of MIG_PRECOPY_INFO: that the first pass is through."""
    shape = {"pre_copy": 1}
    with (
        synthetic(qemu, tmp_path / "a", **shape) as first,
        synthetic(qemu, tmp_path / "b", *INCOMING, **shape) as second,
    ):
        prepare(first, second, capabilities={"switchover-ack": True})
        set_up(first.guest)
        before = digest(first.guest)
        move(first, second)
        assert digest(second.guest) == before
        assert "PRECOPY_INFO failed" not in first.log


def test_cancelled_in_pre_copy(qemu: QemuRoot, tmp_path: Path) -> None:
    shape = {"pre_copy": 1, "p2p": 1}
    with (
        synthetic(qemu, tmp_path / "a", **shape) as first,
        synthetic(qemu, tmp_path / "b", *INCOMING, **shape) as second,
    ):
        prepare(first, second, max_bandwidth=1 << 20)
        set_up(first.guest)
        start(first, second)
        assert first.server
        first.server.wait_log("-> PRE_COPY", SECONDS)
        first.monitor.execute("migrate_cancel")
        assert first.monitor.wait_migration()["status"] == "cancelled"
        first.server.wait_log("PRE_COPY -> RUNNING", SECONDS)
        before = digest(first.guest)
        with synthetic(qemu, tmp_path / "c", *INCOMING, **shape) as third:
            prepare(first, third)
            move(first, third)
            assert digest(third.guest) == before
