"""Owns the console of a Linux guest that moves: a file for each side that it has been on, and what its program says.

Must not know where the guest runs or moves to, and imports nothing that the test machine lacks.
"""

import math
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.qemu_migration.side import Side

ROUND = re.compile(r"^round (\d+)((?: \w+ \d+)*) *\n", re.MULTILINE)
"""A whole line: the last one may be on its way."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the guest's program said last: rounds that held, and its further figures by name."""

    rounds: int
    figures: dict[str, int]


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

    def wait_text(self, side: Side, text: str, seconds: float = math.inf) -> bool:
        """Until the guest has printed `text`; False when the time is over."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            if time.monotonic() > deadline:
                return False
            self._rest(side)
        return True

    def wait_rounds(self, side: Side, wanted: int) -> Progress:
        """Until `wanted` rounds are done. AssertionError if the program found a fault, or its machine has gone."""
        while True:
            text = self.text
            found = ROUND.findall(text)
            assert "failed: " not in text, text[-2000:]
            assert "Kernel panic" not in text, text[-2000:]
            if found and int(found[-1][0]) >= wanted:
                numbers = [int(number) for number, _ in found]
                assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "a round is missing or doubled"
                words = found[-1][1].split()
                return Progress(numbers[-1], {words[at]: int(words[at + 1]) for at in range(0, len(words), 2)})
            self._rest(side)

    @staticmethod
    def _rest(side: Side) -> None:
        """The console is a file, which nobody is told of; the process is what can be waited for."""
        try:
            side.process.wait(0.2)
        except subprocess.TimeoutExpired:
            return
        raise AssertionError(f"QEMU has ended: {side.log}")
