"""Owns one run of the test machine: it boots, runs one command with the checkout at /checkout, and powers off.

Every run has a time limit. What it left behind (console, output, QEMU's own words) stays in the caller's folder. Knows
nothing of tests.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.qemu_root import qemu_root
from tools.vm.devices import Device
from tools.vm.initramfs import initramfs
from tools.vm.kernel import Kernel, KernelName, kernel
from tools.vm.machine import Share, command_line, shares_table
from tools.vm.root import compile_python, guest_root, usr_image

TREE = Path(__file__).resolve().parents[2]
CHECKOUT = "/checkout"
RESULTS = "/results"
MEMORY = 1024
SECONDS = 600.0
# Whose byte code the machine would otherwise compile at each run.
PYTHON_FOLDERS = ("vfu_server", "plugins", "tests", "examples")
SHOWN_LINES = 25


class VmError(Exception):
    """The machine did not run the command to its end; the message has the end of its console and where the rest is."""


@dataclass(frozen=True, slots=True)
class VmResult:
    """A command that ended. `seconds` is the whole run, from before the boot until after the power-off."""

    status: int
    stdout: str
    stderr: str
    console: str
    seconds: float
    folder: Path


def run_in_vm(
    command: Sequence[str],
    *,
    folder: Path,
    kernel_name: KernelName = "stock",
    devices: Sequence[Device] = (),
    shares: Sequence[Share] = (),
    environment: Mapping[str, str] | None = None,
    memory: int = MEMORY,
    kernel_options: str = "",
    timeout: float = SECONDS,
) -> VmResult:
    """Run `command` as root in a new machine, in the checkout, which is on Python's path with its example.

    `folder` must be empty or new: it is /results in the machine and keeps the logs. `shares` are further folders,
    `memory` is MiB, `kernel_options` are for the kernel's command line, `timeout` is seconds for the whole run. Raises
    RootError when a part of the machine cannot be made, VmError when the command did not get to its end; its exit
    status is the caller's to judge.
    """
    booted, root, qemu = kernel(kernel_name), guest_root(), qemu_root()
    compile_python(root, *(TREE / name for name in PYTHON_FOLDERS), seen_as=CHECKOUT, cut=TREE)
    results, console, initrd = folder / "results", folder / "console.log", folder / "initrd"
    results.mkdir(parents=True)
    mounted = [*_shares(booted, results), *shares]
    initrd.write_bytes(initramfs(root, booted, shares_table(mounted), _job(command, environment or {})))
    argv = command_line(
        qemu,
        booted,
        initrd,
        console=console,
        usr=usr_image(),
        shares=mounted,
        devices=devices,
        memory=memory,
        kernel_options=kernel_options,
    )
    began = time.monotonic()
    reason = _run(argv, qemu.environment, folder / "qemu.log", timeout)
    initrd.unlink()
    text = _text(console)
    status = _text(results / "status").strip()
    if reason or not status:
        raise VmError(_report(reason or "the machine ended before the command did", folder))
    return VmResult(
        status=int(status),
        stdout=_text(results / "stdout"),
        stderr=_text(results / "stderr"),
        console=text,
        seconds=time.monotonic() - began,
        folder=folder,
    )


def _shares(booted: Kernel, results: Path) -> list[Share]:
    fixed = [Share(TREE, CHECKOUT), Share(results, RESULTS, writable=True)]
    if booted.modules is not None:
        fixed.append(Share(booted.modules.parent, "/usr/lib/modules"))
    return fixed


def _job(command: Sequence[str], environment: Mapping[str, str]) -> str:
    # What the machine compiles it cannot keep, since the checkout is read-only there.
    variables = {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/examples/e1000e", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return f"cd {CHECKOUT}\n{exports}exec {shlex.join(command)}\n"


def _run(argv: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float) -> str:
    """Run QEMU to its end; what went wrong, or nothing."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            argv, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"the machine was still running after {timeout:g} s"
        finally:
            process.kill()
            process.wait()
    return f"QEMU ended with status {status}" if status else ""


def _report(reason: str, folder: Path) -> str:
    parts = [reason]
    for name in ("qemu.log", "results/stdout", "results/stderr", "console.log"):
        lines = _text(folder / name).splitlines()
        if lines:
            parts.append(f"--- the end of {folder / name}:")
            parts += lines[-SHOWN_LINES:]
    return "\n".join(parts)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
