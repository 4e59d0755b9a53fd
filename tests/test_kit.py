"""The tests' own rules: the time limit strikes, and a lane that cannot run is a failure in CI and a skip elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent


def run_pytest(path: Path, source: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `source` as a test file under the project's own configuration."""
    file = path / "test_inner.py"
    file.write_text(source)
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        str(TREE / "pyproject.toml"),
        "-p",
        "tests.deadline",
        str(file),
    ]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=TREE,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_deadline_fails_the_test_and_shows_all_stacks(tmp_path: Path) -> None:
    source = """
import threading
import pytest

@pytest.mark.deadline(0.2)
def test_waits_for_ever():
    threading.Event().wait()

def test_next():
    pass
"""
    done = run_pytest(tmp_path, source)
    assert "1 failed, 1 passed" in done.stdout
    assert "the test took longer than 0.2 s" in done.stdout
    assert "test_waits_for_ever" in done.stderr


@pytest.mark.parametrize(("environment", "outcome"), [({"CI": "true"}, "1 failed"), ({}, "1 skipped")])
def test_lane_that_cannot_run(tmp_path: Path, environment: dict[str, str], outcome: str) -> None:
    source = "from tests.lanes import lane_unavailable\ndef test_lane():\n    lane_unavailable('no such hardware')\n"
    done = run_pytest(tmp_path, source, **environment)
    assert outcome in done.stdout
    assert "no such hardware" in done.stdout
