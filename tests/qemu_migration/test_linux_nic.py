"""A Linux guest with its own e1000e sends frames without a pause, checks every answer, and is moved there and back.

The server has examples/e1000e, a plugin from outside of our tree; the cards are its models.
"""

import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.kit.conftest import installed
from tests.lanes import lane_unavailable
from tests.qemu_migration.console import Console
from tests.qemu_migration.monitor import SECONDS
from tests.qemu_migration.moves import move, prepare
from tests.qemu_migration.side import Side, socket_of
from tests.server.programs import TREE, Server
from tools.qemu_root import QemuRoot
from tools.vm.initramfs import Cpio, plain_module
from tools.vm.kernel import is_made, kernel

MOVES = 20
FRAMES = 8
"""Of a round."""
PROGRAM = Path(__file__).with_name("nic_init.c")
DRIVER = "kernel/drivers/net/ethernet/intel/e1000e/e1000e.ko.xz"
EXAMPLE = TREE / "examples" / "e1000e"
TCG = ("tcg", "thread=multi")
pytestmark = [pytest.mark.vm, pytest.mark.deadline(1200)]


def boot_files(folder: Path) -> list[str]:
    """QEMU's arguments for Debian's kernel, and a system of one program and one driver."""
    if not is_made("stock"):
        lane_unavailable("Debian's kernel has not been fetched (tools/vm/kernel.py)")
    stock = kernel("stock")
    assert stock.modules is not None
    program = folder / "init"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(program), str(PROGRAM)], check=True)
    cpio = Cpio()
    cpio.add("dev", stat.S_IFDIR | 0o755)
    cpio.add("init", stat.S_IFREG | 0o755, program.read_bytes())
    cpio.add("e1000e.ko", stat.S_IFREG | 0o644, plain_module(stock.modules / DRIVER))
    (folder / "initrd").write_bytes(cpio.finish())
    return [
        *("-kernel", str(stock.image), "-initrd", str(folder / "initrd")),
        *("-append", "console=ttyS0 quiet loglevel=0 panic=-1 mitigations=off"),
    ]


@contextmanager
def side(qemu: QemuRoot, folder: Path, site: Path, *arguments: str) -> Iterator[Side]:
    """A side whose server has the example and its model."""
    folder.mkdir()
    options = ("--plugin", "e1000e", "--model", "e1000e", "--socket-path", socket_of(folder))
    with Server(*options, "--dirty-tracking", "all", sites=[EXAMPLE, site]) as server:
        server.wait_log("listening", SECONDS)
        with Side(qemu, folder, *arguments, server=server, accel=TCG) as made:
            yield made


def test_frames_go_on_while_the_guest_moves(qemu: QemuRoot, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    installed(site, "e1000e", "e1000e")
    console, boot = Console(tmp_path), boot_files(tmp_path)
    with ExitStack() as last:
        here = last.enter_context(side(qemu, tmp_path / "0", site, *boot, *console.arguments("0")))
        prepare(here)
        progress = console.wait_rounds(here, 3)
        for number in range(1, MOVES + 1):
            with ExitStack() as coming:
                arguments = [*boot, *console.arguments(str(number)), "-incoming", "defer"]
                there = coming.enter_context(side(qemu, tmp_path / str(number), site, *arguments))
                prepare(there)
                move(here, there)
                last.close()
                here, last = there, coming.pop_all()
            before, progress = progress, console.wait_rounds(here, progress.rounds + 5)
            more = progress.figures["answers"] - before.figures["answers"]
            assert more >= 4 * FRAMES, f"move {number}: {before}, then {progress}"
        last.close()
