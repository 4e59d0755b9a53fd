"""Owns what tests of the virtual machine use: run a command there, or scripts of tests/vm/guest and judge their checks.

All scripts that a session's tests want from one kind of machine run in one machine, one after the other: a boot and the
start of QEMU cost as much as many checks. A machine that cannot be made here says why, and fails in CI. Must not know
what the scripts check.
"""

import ast
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from tests.lanes import lane_unavailable
from tools.debian_root import RootError
from tools.vm.devices import Device
from tools.vm.kernel import KernelName
from tools.vm.machine import Share
from tools.vm.run import CHECKOUT, MEMORY, TREE, VmError, VmResult, run_in_vm

KEPT = TREE / "build" / "vm"
GUEST = Path(__file__).resolve().parent / "guest"
IN_VM = f"{CHECKOUT}/tests/vm/guest"
REPORT = "report: "
"""Begins a line of a script's output that is for the reader of the session's summary."""
SECONDS = 2400.0
"""For all that a machine does: only one that hangs comes near it, however busy the machine below is."""


@dataclass(frozen=True, slots=True)
class Plugged:
    """What a machine is made with: devices, further folders, MiB of memory, further options of its kernel."""

    devices: Sequence[Device] = ()
    shares: Sequence[Share] = ()
    memory: int = MEMORY
    kernel_options: str = ""


Plug = Callable[[Path], AbstractContextManager[Plugged]]
"""Makes what a machine needs, in a folder of its own, for as long as the machine runs."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of machine: its name, its kernel, and what it is plugged together from."""

    name: str
    kernel: KernelName
    plug: Plug = field(compare=False)


@dataclass(frozen=True, slots=True)
class Run:
    """One script with its arguments, in one kind of machine."""

    kind: Kind
    script: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checks:
    """What the checks of one script said in one machine: name -> nothing, or how it failed.

    `end` tells how the script and its machine ended.
    """

    outcomes: dict[str, str]
    end: str

    def judge(self, name: str) -> None:
        """Fail unless the check was run and held."""
        if name not in self.outcomes:
            pytest.fail(f"the machine did not get to {name}\n{self.end}", pytrace=False)
        if self.outcomes[name]:
            pytest.fail(f"{self.outcomes[name]}\n{self.end}", pytrace=False)


def checks_of(script: str) -> list[str]:
    """The names of the checks in a script of tests/vm/guest, without importing it."""
    tree = ast.parse((GUEST / script).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]


def each_check(script: str, *runs: tuple[Kind, Sequence[str]]) -> pytest.MarkDecorator:
    """Parametrizes a test with (run, check): every check of the script, for each kind of machine and its arguments."""
    return pytest.mark.parametrize(
        ("run", "check"),
        [
            pytest.param(Run(kind, script, tuple(arguments)), check, id="-".join((kind.name, *arguments, check)))
            for kind, arguments in runs
            for check in checks_of(script)
        ],
    )


def vm(command: Sequence[str], folder: Path, kernel_name: KernelName, **options: object) -> VmResult:
    """`run_in_vm`, or the reason why this machine has no such lane."""
    try:
        return run_in_vm(command, folder=folder, kernel_name=kernel_name, **options)
    except RootError as error:
        lane_unavailable(str(error))


class Machines:
    """The machines of a session: each kind is booted once, for all scripts that tests of the session want from it."""

    def __init__(self, wanted: Iterable[Run], folder: Callable[[str], Path]) -> None:
        self._wanted = tuple(dict.fromkeys(wanted))
        self._folder = folder
        self._found: dict[Run, Checks] = {}
        self.times: list[str] = []
        """What took how long, a line for each machine and script."""

    def checks(self, run: Run) -> Checks:
        """What the checks of one script said."""
        if run not in self._found:
            self._boot(run.kind)
        return self._found[run]

    def _boot(self, kind: Kind) -> None:
        runs = [run for run in self._wanted if run.kind == kind]
        home = self._folder(kind.name)
        folder, commands = home / "run", json.dumps([[run.script, *run.arguments] for run in runs])
        argv = ["python3", f"{IN_VM}/in_turn.py", "script", commands]
        try:
            with kind.plug(home) as plugged:
                options = {each.name: getattr(plugged, each.name) for each in fields(plugged)}
                result = vm(argv, folder, kind.kernel, timeout=SECONDS, **options)
            status, end = result.status, result.stderr
            self.times.append(f"{result.seconds:7.1f} s  machine {kind.name}")
        except RootError as error:
            lane_unavailable(str(error))
        except VmError as error:
            status, end = -1, str(error)
        if status:
            kept = KEPT / kind.name
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept)
            end += f"\n(all that the machine left is in {kept})"
        for number, run in enumerate(runs):
            self._found[run] = self._read(run, folder / "results" / f"script-{number}", end)

    def _read(self, run: Run, folder: Path, end: str) -> Checks:
        lines = _text(folder / "checks").splitlines()
        ended = json.loads(_text(folder / "ended") or "{}")
        if ended:
            self.times.append(f"{ended['seconds']:7.1f} s    {' '.join((run.script, *run.arguments))}")
            said = (line for line in _text(folder / "stdout").splitlines() if line.startswith(REPORT))
            self.times += (f"{'':13}{line.removeprefix(REPORT)}" for line in said)
        told = f"exit status {ended.get('status', 'unknown')}\n{_text(folder / 'stderr')}{end}"
        return Checks({entry["check"]: entry["error"] for entry in map(json.loads, lines)}, told)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
