"""A guest with two devices moves: of one server, of a server for each; or is refused where devices cannot take it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.plugins_synthetic.device import MAGIC, REG_CHANGE_MANY, REG_DIGEST, REG_MAGIC
from tests.plugins_synthetic.plugin import install_synthetic, options
from tests.qemu.qtest import Qtest
from tests.qemu_migration.edu_guest import BAR
from tests.qemu_migration.monitor import SECONDS, QmpError
from tests.qemu_migration.moves import move, prepare
from tests.qemu_migration.side import Side
from tests.server.programs import Server
from tools.qemu_root import QemuRoot

SIZE = 4 << 20
SLOTS = (4, 5)
BARS = (BAR - (1 << 20), BAR)
INCOMING = ("-incoming", "defer")
SERVERS = pytest.mark.parametrize("servers", [1, 2], ids=["one server", "two servers"])


@contextmanager
def with_two(
    qemu: QemuRoot, folder: Path, servers: int, *arguments: str, **shape: float
) -> Iterator[tuple[Side, list[Server]]]:
    """A side with two synthetic devices, each at a socket of its own, and their servers."""
    folder.mkdir()
    install_synthetic(folder / "site")
    running, devices = [], []
    with ExitStack() as stack:
        for slot in SLOTS:
            address = {"type": "unix", "path": str(folder / f"{slot}.sock")}
            device = {"driver": "vfio-user-pci", "id": f"device{slot}", "addr": f"{slot:#x}", "socket": address}
            devices += ["-device", json.dumps(device)]
        each = len(SLOTS) // servers
        for first in range(0, len(SLOTS), each):
            words = [*options(**({"size": SIZE} | shape)), "--dirty-tracking", "all"]
            words += ["--model", "synthetic"] * (each - 1)
            for slot in SLOTS[first : first + each]:
                words += ["--socket-path", str(folder / f"{slot}.sock")]
            server = stack.enter_context(Server(*words, sites=[folder / "site"], TMPDIR=str(folder)))
            for slot in SLOTS[first : first + each]:
                server.wait_log(f"{slot}.sock (", SECONDS)
            running.append(server)
        yield stack.enter_context(Side(qemu, folder, *devices, *arguments, server=None)), running


def set_up(guest: Qtest) -> None:
    """Both BARs, and states that differ."""
    for count, (slot, bar) in enumerate(zip(SLOTS, BARS, strict=True), 3):
        guest.config_write(slot, 0x10, 4, bar)
        guest.config_write(slot, 0x04, 2, 0x6)
        assert guest.read(bar + REG_MAGIC, 4) == MAGIC
        guest.write(bar + REG_CHANGE_MANY, 4, 10 * count)


def digests(guest: Qtest) -> list[int]:
    """What tells the states of both apart."""
    return [guest.read(bar + REG_DIGEST + at, 4) for bar in BARS for at in (0, 4)]


@SERVERS
@pytest.mark.parametrize("shape", [{"p2p": 1}, {"pre_copy": 1, "p2p": 1}], ids=str)
def test_both_arrive_and_go_on(qemu: QemuRoot, tmp_path: Path, servers: int, shape: dict[str, float]) -> None:
    with ExitStack() as stack:
        here, its = stack.enter_context(with_two(qemu, tmp_path / "0", servers, **shape))
        prepare(here)
        set_up(here.guest)
        for number in (1, 2):
            there, others = stack.enter_context(with_two(qemu, tmp_path / str(number), servers, *INCOMING, **shape))
            prepare(there)
            before = digests(here.guest)
            assert before[:2] != before[2:]
            found = move(here, there)
            assert found["vfio"]["transferred"] >= 2 * SIZE
            assert digests(there.guest) == before
            for bar in BARS:
                there.guest.write(bar + REG_CHANGE_MANY, 4, 5)
            assert digests(there.guest) != before
            for server in its:
                log = server.wait_log("STOP_COPY -> STOP", SECONDS)
                assert ("PRE_COPY_P2P -> STOP_COPY" if "pre_copy" in shape else "RUNNING_P2P -> STOP") in log
                assert "warning" not in log
            here, its = there, others


@SERVERS
def test_devices_that_cannot_stop_in_two_steps_are_refused(qemu: QemuRoot, tmp_path: Path, servers: int) -> None:
    with with_two(qemu, tmp_path / "a", servers) as (side, _):
        prepare(side)
        set_up(side.guest)
        before = digests(side.guest)
        with pytest.raises(QmpError, match="P2P"):
            side.monitor.execute("migrate", uri=f"file:{tmp_path / 'state'}")
        assert side.status() == "running"
        assert digests(side.guest) == before
