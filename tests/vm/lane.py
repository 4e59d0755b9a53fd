"""Owns what tests of the virtual machine use: run a command or a script of tests/vm/guest there, and judge its checks.

A machine that cannot be made here says why, and fails in CI. Must not know what the scripts check.
"""

import ast
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lanes import lane_unavailable
from tools.debian_root import RootError
from tools.vm.devices import Device
from tools.vm.kernel import KernelName
from tools.vm.run import CHECKOUT, TREE, VmError, VmResult, run_in_vm

KEPT = TREE / "build" / "vm"
GUEST = Path(__file__).resolve().parent / "guest"
IN_VM = f"{CHECKOUT}/tests/vm/guest"


@dataclass(frozen=True, slots=True)
class Checks:
    """What the checks of one script said in one machine: name -> nothing, or how it failed.

    `end` tells how the machine ended.
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


def vm(command: Sequence[str], folder: Path, kernel_name: KernelName, **options: object) -> VmResult:
    """`run_in_vm`, or the reason why this machine has no such lane."""
    try:
        return run_in_vm(command, folder=folder, kernel_name=kernel_name, **options)
    except RootError as error:
        lane_unavailable(str(error))


def vm_python(script: str, *arguments: str, folder: Path, kernel_name: KernelName, **options: object) -> VmResult:
    """Run a script of tests/vm/guest with Debian's Python."""
    command = ["python3", f"{IN_VM}/{script}", *arguments]
    return vm(command, folder, kernel_name, **options)


def vm_checks(
    script: str,
    *arguments: str,
    folder: Path,
    kernel_name: KernelName,
    devices: Sequence[Device],
    timeout: float = 90,
    **options: object,
) -> Checks:
    """Run a script of checks in one machine; how it ended is told by each check that asks.

    Of a run that failed everything is kept in build/vm, which outlives pytest's folders.
    """
    try:
        options |= {"devices": devices, "timeout": timeout}
        result = vm_python(script, *arguments, folder=folder, kernel_name=kernel_name, **options)
        status, end = result.status, result.stderr
    except VmError as error:
        status, end = -1, str(error)
    record = folder / "results" / "checks"
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    outcomes = {entry["check"]: entry["error"] for entry in map(json.loads, lines)}
    if status:
        kept = KEPT / f"{script.removesuffix('.py')}-{folder.name}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
        end += f"\n(all that the machine left is in {kept})"
    return Checks(outcomes, end)
