"""docs/plugins/tutorial.md from its first line to its last: every file is written, every command run, in order.

Two things are done in the test's own way: `pip install` (what it leaves is made by hand, without a network) and sockets
in /tmp (they go into a folder of the test's).
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadline import SECONDS
from tests.documents import TREE, blocks, commands
from tests.kit.conftest import installed
from tests.server.programs import environment

PAGE = TREE / "docs" / "plugins" / "tutorial.md"
MODULES = {
    "vfu-plugin": ["-P", "-m", "vfu_server.tools.plugin"],
    "vfu-server": ["-P", "-m", "vfu_server"],
    "vfu-migrate": ["-P", "-m", "vfu_server.tools.migrate"],
    "vfu-model": ["-P", "-m", "vfu_server.model_server"],
    "pytest": ["-m", "pytest", "-p", "vfu_server.testing.pytest_plugin", "-p", "no:cacheprovider"],
}


class Shell:
    """A person at a terminal."""

    def __init__(self, folder: Path) -> None:
        self.home = self.cwd = folder
        self.running: list[subprocess.Popen[str]] = []
        self.said: dict[str, str] = {}

    def run(self, line: str) -> None:
        line = line.replace("/tmp/", f"{self.home}/")
        *words, last = shlex.split(line)
        background = last == "&"
        words += [] if background else [last]
        match words:
            case ["cd", folder]:
                self.cwd /= folder
            case ["pip", "install", "-e", "."]:
                installed(self.cwd, self.cwd.name, self.cwd.name)
            case ["rm", path]:
                (self.cwd / path).unlink()
            case [program, *arguments]:
                self.start([sys.executable, *MODULES[program], *arguments], line, background)

    def start(self, command: list[str], line: str, background: bool) -> None:
        env = environment(self.cwd, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", COLUMNS="200", TMPDIR=str(self.home))
        process = subprocess.Popen(
            command, cwd=self.cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if background:
            self.running.append(process)
            heard = process.stdout.readline()
            while "listening at" not in heard and not heard.startswith("ready "):
                assert process.poll() is None, heard
                heard = process.stdout.readline()
            return
        self.said[line] = process.communicate(timeout=4 * SECONDS)[0]
        assert process.returncode == 0, f"{line}\n{self.said[line]}"

    def leave(self) -> None:
        """Servers before the models that they are put before."""
        for process in reversed(self.running):
            process.terminate()
            process.communicate(timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.deadline(600)
def test_the_tutorial_from_its_first_line_to_its_last(folder):
    shell = Shell(folder)
    try:
        for block in blocks(PAGE):
            if block.language == "console":
                for line in commands(block):
                    shell.run(line)
            else:
                name = block.body.splitlines()[0].removeprefix("# ")
                (shell.cwd / name).write_text(block.body)
        trace = (shell.cwd / "trace.txt").read_text()
    finally:
        shell.leave()
    told = list(shell.said.values())
    assert any("a write would start DMA" in each for each in told)
    assert any("17 checks: 1" in each and "failed" not in each for each in told)
    assert "load_done()" in trace
    assert [process.returncode for process in shell.running] == [0] * len(shell.running)
