"""The tree is typed, linted and formatted, and no source file is longer than a reader can hold."""

import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
SOURCES = ("vfu_server", "plugins", "tools", "tests", "benchmarks", "examples")
MOST_LINES = 600


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "--quiet"), ("ruff", "format", "--check", "--quiet"), ("mypy",)],
    ids=["lint", "format", "types"],
)
@pytest.mark.deadline(300)
def test_tool_finds_nothing(command: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_source_file_is_too_long() -> None:
    files = [path for folder in SOURCES for kind in ("py", "c", "h") for path in (TREE / folder).rglob(f"*.{kind}")]
    assert len(files) > 10
    lengths = {path.relative_to(TREE).as_posix(): len(path.read_bytes().splitlines()) for path in files}
    lengths.pop("vfu_server/libvfio_user/_native.c", None)
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
