"""Owns a Linux guest for migration: the kernel of the test machine, one program as its system, its console as a file.

Must not know where the guest runs or moves to.
"""

import re
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.lanes import lane_unavailable
from tests.qemu_migration.side import Side
from tools.debian_root import RootError
from tools.vm.initramfs import Cpio
from tools.vm.kernel import is_made, kernel

PROGRAM = Path(__file__).with_name("busy_init.c")
ROUND = re.compile(r"^round (\d+) interrupts (\d+) idle (\d+)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Progress:
    """What the guest's program said last: rounds that held, interrupts in all, those that found nothing done."""

    rounds: int
    interrupts: int
    idle: int


class Console:
    """The console files of one guest, in the order of the sides that it has been on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []

    def arguments(self, name: str) -> list[str]:
        """QEMU's arguments for the console of the next side."""
        file = self._folder / f"{name}.console"
        file.touch()
        self._files.append(file)
        return ["-chardev", f"file,id=console,path={file}", "-serial", "chardev:console"]

    @property
    def text(self) -> str:
        """All that the guest has printed; a line may have begun on one side and ended on the next."""
        return "".join(file.read_text(errors="replace") for file in self._files).replace("\r", "")

    def wait_text(self, side: Side, text: str) -> None:
        """Until the guest has printed `text`."""
        while text not in self.text:
            self._rest(side)

    def wait_rounds(self, side: Side, wanted: int) -> Progress:
        """Until `wanted` rounds are done. AssertionError if the program found a fault, or its machine has gone."""
        while True:
            text = self.text
            found = ROUND.findall(text)
            assert "failed: " not in text, text[-2000:]
            assert "Kernel panic" not in text, text[-2000:]
            if found and int(found[-1][0]) >= wanted:
                numbers = [int(number) for number, _, _ in found]
                assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "a round is missing or doubled"
                return Progress(*map(int, found[-1]))
            self._rest(side)

    @staticmethod
    def _rest(side: Side) -> None:
        """The console is a file, which nobody is told of; the process is what can be waited for."""
        try:
            side.process.wait(0.2)
        except subprocess.TimeoutExpired:
            return
        raise AssertionError(f"QEMU has ended: {side.log}")


def boot_files(folder: Path) -> list[str]:
    """QEMU's arguments for kernel and initial memory file system, made in `folder`."""
    if not is_made("custom"):
        lane_unavailable("the custom kernel has not been compiled (tools/vm/kernel.py)")
    try:
        image = kernel("custom").image
    except RootError as error:
        lane_unavailable(str(error))
    program = folder / "init"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(program), str(PROGRAM)], check=True)
    cpio = Cpio()
    cpio.add("dev", stat.S_IFDIR | 0o755)
    cpio.add("init", stat.S_IFREG | 0o755, program.read_bytes())
    (folder / "initrd").write_bytes(cpio.finish())
    return [
        *("-kernel", str(image), "-initrd", str(folder / "initrd")),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
    ]
