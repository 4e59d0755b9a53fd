"""System packages: what is there asks for nothing, root installs what is missing, others are told the line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
TOOLS = ("sh", "env", "dirname", "mktemp", "rm", "tail", "cat")


class Machine:
    """A folder of programs that stand for a machine's package tools; each call of apt-get is a line in `log`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        for tool in TOOLS:
            (folder / tool).symlink_to(f"/bin/{tool}" if Path(f"/bin/{tool}").exists() else f"/usr/bin/{tool}")
        self.program("apt-get", f'echo "$@" >> {self.log}')

    def program(self, name: str, script: str) -> None:
        file = self.folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def user(self, number: int) -> None:
        self.program("id", f"echo {number}")

    def lacks(self, *packages: str) -> None:
        cases = "".join(f"{package}) exit 1;; " for package in packages)
        self.program("dpkg-query", f'case "$4" in {cases}*) echo installed;; esac')

    def run(self, *arguments: str, python: str = sys.executable) -> "subprocess.CompletedProcess[str]":
        command = [str(TREE / "tools/system-packages"), *arguments]
        environment = {"PATH": str(self.folder), "PYTHON": python}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def installs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if " install " in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_nothing_is_done_when_all_is_there(machine: Machine) -> None:
    machine.user(1000)
    machine.lacks()
    done = machine.run("test")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine.log.read_text() == ""


def test_root_installs_what_is_missing_and_no_more(machine: Machine) -> None:
    machine.user(0)
    machine.lacks("libjson-c-dev", "mmdebstrap")
    assert machine.run("build").returncode == 0
    (install,) = machine.installs()
    assert install.endswith("install --yes --no-install-recommends libjson-c-dev")
    assert machine.run("test").returncode == 0
    assert machine.installs()[1].endswith("libjson-c-dev mmdebstrap")


def test_other_user_is_told_the_line(machine: Machine) -> None:
    machine.user(1000)
    machine.lacks("gcc", "libjson-c-dev")
    done = machine.run()
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: system packages are missing and this user cannot install them. Run as root, then try again:",
        "    apt-get install --yes --no-install-recommends gcc libjson-c-dev",
    ]
    assert machine.log.read_text() == ""


@pytest.mark.parametrize(("answer", "status"), [(0, 0), (1, 1)])
def test_sudo_is_used_only_where_it_asks_nothing(machine: Machine, answer: int, status: int) -> None:
    machine.user(1000)
    machine.lacks("gcc")
    machine.program("sudo", f'[ "$2" = true ] && exit {answer}; shift; exec "$@"')
    assert machine.run().returncode == status
    assert len(machine.installs()) == 1 - status


def test_failed_install_shows_why(machine: Machine) -> None:
    machine.user(0)
    machine.lacks("gcc")
    machine.program("apt-get", "echo 'E: Unable to locate package gcc'; exit 100")
    done = machine.run()
    assert done.returncode == 1
    assert "E: Unable to locate package gcc" in done.stderr
    assert "error: this failed: apt-get install --yes --no-install-recommends gcc" in done.stderr


def test_machine_without_python_gets_debians(machine: Machine) -> None:
    machine.user(0)
    machine.lacks("python3", "python3-dev", "python3-venv")
    command = [str(TREE / "tools/system-packages")]
    text = (TREE / "tools/find-python").read_text()
    assert "/usr/bin/python3" in text
    done = subprocess.run(command, env={"PATH": str(machine.folder)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    wanted = "python3 python3-dev python3-venv"
    assert all(line.endswith(wanted) for line in machine.installs())


def test_python_that_does_not_suit_is_refused(machine: Machine) -> None:
    machine.user(0)
    machine.lacks()
    machine.program("old-python", "exit 1")
    done = machine.run(python=str(machine.folder / "old-python"))
    assert done.returncode == 1
    assert "no Python 3.11 or newer found at" in done.stderr


def test_first_python_that_runs_is_taken(machine: Machine) -> None:
    machine.program("python3", "exit 127")
    (machine.folder / "python3.12").symlink_to(sys.executable)
    environment = {"PATH": str(machine.folder)}
    done = subprocess.run(
        [str(TREE / "tools/find-python")], env=environment, capture_output=True, text=True, check=False
    )
    assert os.path.basename(done.stdout.strip()) == "python3.12"
