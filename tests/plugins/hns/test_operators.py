"""The operator's page: what it shows without hardware runs as it stands there, and what it says of messages is said.

What it shows of a Kunpeng host nobody could run here; its command lines are at least ones that the programs take.
"""

import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.documents import TREE, blocks, commands, table, text
from tests.server.programs import Server, environment
from vfu_server import cli_parser

PAGE = "docs/operators/hns.md"
SECONDS = 120.0
PROGRAMS = {"python": [sys.executable], "vfu-migrate": [sys.executable, "-P", "-m", "vfu_server.tools.migrate"]}


def without_hardware() -> tuple[list[str], list[str]]:
    """The servers of that part, and what is called beside them, as (command lines, command lines)."""
    (part,) = re.findall(r"^## Without hardware\n(.*)", text(PAGE), re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python|vfu-migrate) [^`]*/tmp/[^`]*)`", part.replace("\n", " "))
    (block,) = [block for block in blocks(TREE / PAGE, "console") if "/tmp/a.sock" in block.body]
    return commands(block), inline


def run(line: str) -> str:
    program, *arguments = shlex.split(line)
    done = subprocess.run(
        [*PROGRAMS[program], *arguments],
        cwd=TREE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_the_part_without_hardware_runs_as_it_stands(folder: Path) -> None:
    servers, (traffic, move) = without_hardware()
    assert len(servers) == 2
    there = lambda line: line.replace("/tmp/", f"{folder}/")  # noqa: E731 - the one thing that is changed
    with ExitStack() as stack:
        started = [stack.enter_context(Server(*shlex.split(there(line))[1:])) for line in servers]
        for server in started:
            server.wait_log("listening at", SECONDS)
        found = re.search(r"submitted=(\d+), completed=(\d+)", run(f"{there(traffic)} --seconds 1"))
        assert found is not None
        assert found[1] == found[2] != "0"
        run(there(move))
        for server in started:
            assert server.end(seconds=SECONDS)[0] == 0, server.log


def test_its_command_lines_are_taken() -> None:
    lines = [line for block in blocks(TREE / PAGE, "console") for line in re.findall(r"(vfu-server .*)", block.body)]
    assert len(lines) >= 4
    for line in lines:
        if " doctor " not in line:
            cli_parser.build().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("message", [row[0].strip("`") for row in table(PAGE, "message")])
def test_a_message_that_is_explained_is_one_that_is_said(message: str) -> None:
    """Each piece between numbers and names stands in one of the plugin's files."""
    sources = " ".join(path.read_text() for path in sorted((TREE / "plugins/hns").glob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)
    for piece in re.split(r"\.\.\.|\d+", message):
        if words := piece.strip(" :,"):
            assert words in said, words
