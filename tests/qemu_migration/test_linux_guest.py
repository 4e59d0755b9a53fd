"""A Linux guest keeps edu busy with DMA and interrupts, checks every byte, and is moved there and back twenty times."""

import json
import re
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.qemu_migration.console import Console
from tests.qemu_migration.linux import boot_files
from tests.qemu_migration.moves import move, prepare
from tests.qemu_migration.side import Side, side
from tests.server.programs import TREE
from tools.qemu_root import QemuRoot

MOVES = 40
"""Twenty times there and back."""
SECONDS = 1500
TCG = ("tcg", "thread=multi")
pytestmark = [pytest.mark.vm, pytest.mark.deadline(SECONDS + 60)]


def no_late_access(one: Side) -> None:
    """Nothing came to the device while it was stopped, neither dropped nor passed on; the client made no mistake."""
    assert one.server
    one.server.process.send_signal(signal.SIGUSR1)
    log = one.server.wait_log("memory_not_carried", 60)
    found = re.search(r"accesses=\[(.*)\] mistakes=\[\] .*door_errors=0 ", log)
    assert found, log
    assert "stopped" not in found[1], log
    assert "drop" not in found[1], log


def timing(found: dict[str, Any]) -> dict[str, Any]:
    """Of query-migrate what is about time, in milliseconds."""
    return {key: found[key] for key in ("total-time", "downtime", "setup-time")}


def keep(name: str, figures: list[dict[str, Any]], **more: int) -> None:
    """Leave what was measured in build/, for whoever wants to compare."""
    kept = TREE / "build" / f"qemu_migration-{name}.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"moves": figures, **more}, indent=1))


def test_twenty_times_there_and_back_under_load(qemu: QemuRoot, tmp_path: Path) -> None:
    console = Console(tmp_path)
    boot = boot_files(tmp_path)
    figures: list[dict[str, Any]] = []
    with ExitStack() as last:
        here = last.enter_context(side(qemu, tmp_path / "0", *boot, *console.arguments("0"), accel=TCG))
        prepare(here)
        progress = console.wait_rounds(here, 3)
        for number in range(1, MOVES + 1):
            with ExitStack() as coming:
                arguments = [*boot, *console.arguments(str(number)), "-incoming", "defer"]
                there = coming.enter_context(side(qemu, tmp_path / str(number), *arguments, accel=TCG))
                prepare(there)
                figures.append(timing(move(here, there)))
                no_late_access(here)
                last.close()
                here, last = there, coming.pop_all()
            progress = console.wait_rounds(here, progress.rounds + 3)
        last.close()
    keep("edu", figures, rounds=progress.rounds, **progress.figures)
    # Each round has two transfers, and the guest has waited for an interrupt of each. edu's state cannot tell whether
    # one that is pending has been delivered, so it is signalled once more after a move.
    assert 0 <= progress.figures["interrupts"] - 2 * progress.rounds <= MOVES


def test_the_same_machine_without_the_device(qemu: QemuRoot, tmp_path: Path) -> None:
    """What a move takes if there is nothing of ours in it; its figures stand beside the others."""
    console = Console(tmp_path)
    boot = boot_files(tmp_path)
    figures: list[dict[str, Any]] = []
    (tmp_path / "0").mkdir()
    with ExitStack() as last:
        here = last.enter_context(Side(qemu, tmp_path / "0", *boot, *console.arguments("0"), server=None, accel=TCG))
        prepare(here)
        console.wait_text(here, "failed: 0x11e8: ")
        for number in range(1, 6):
            folder = tmp_path / str(number)
            folder.mkdir()
            with ExitStack() as coming:
                arguments = [*boot, *console.arguments(str(number)), "-incoming", "defer"]
                there = coming.enter_context(Side(qemu, folder, *arguments, server=None, accel=TCG))
                prepare(there)
                figures.append(timing(move(here, there)))
                last.close()
                here, last = there, coming.pop_all()
        assert here.status() == "running"
        last.close()
    keep("without", figures)
