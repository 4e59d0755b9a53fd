"""Owns an arm64 system below a folder, run by user-mode emulation: its Python with what the server needs, its compiler.

Nothing is installed or registered on this machine, and nothing is entered by chroot. An emulated program cannot start
another one of its architecture, so each that is started by others (compiler passes, Python) has a script here that runs
it under the emulator. Run as a program it prints the root's path.
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.debian_root import RootError, RootSpec, debian_root

SUITE = "trixie"
EMULATOR = RootSpec(name="qemu-user", suite=SUITE, packages=("qemu-user",))
SYSTEM = RootSpec(
    name="arm64",
    suite=SUITE,
    packages=(
        *("python3-dev", "python3-cffi", "python3-trio", "python3-pluggy", "python3-rich", "python3-msgspec"),
        *("python3-setuptools", "python3-pytest", "python3-hypothesis"),
        *("gcc", "binutils", "libc6-dev", "libjson-c-dev"),
    ),
    architecture="arm64",
)
TRIPLET = "aarch64-linux-gnu"
PASSES = ("cc1", "collect2", "lto-wrapper")
TOOLS = {"as": f"{TRIPLET}-as", "ld": f"{TRIPLET}-ld.bfd"}


@dataclass(frozen=True, slots=True)
class Arm64:
    """`python` and `cc` are scripts of this machine that run the root's programs."""

    root: Path
    python: Path
    cc: Path

    @property
    def environment(self) -> dict[str, str]:
        """For programs that start Python or the compiler themselves."""
        return {"CC": str(self.cc), "PYTHONPATH": str(self.python.parent), "PYTHONDONTWRITEBYTECODE": "1"}


def arm64(folder: Path) -> Arm64:
    """The system, with its scripts written into `folder`. Raises RootError with the reason."""
    emulator = debian_root(EMULATOR, _verify_emulator) / "usr/bin/qemu-aarch64"
    root = debian_root(SYSTEM, _finish)
    run = f"{shlex.quote(str(emulator))} -L {shlex.quote(str(root))}"
    programs = folder / "passes"
    programs.mkdir(parents=True)
    for name in PASSES:
        (found,) = (root / "usr/libexec/gcc" / TRIPLET).glob(f"*/{name}")
        _script(programs / name, f"{run} {found}")
    for name, tool in TOOLS.items():
        _script(programs / name, f"{run} {root / 'usr/bin' / tool}")
    gcc = (root / f"usr/bin/{TRIPLET}-gcc").resolve()
    cc = _script(folder / "cc", f"{run} {gcc} -B{programs}/ --sysroot={root}")
    python = _script(folder / "python", f"{run} {root / 'usr/bin/python3'}")
    (folder / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(python)!r}\n")
    return Arm64(root, python, cc)


def _script(path: Path, command: str) -> Path:
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    return path


def _verify_emulator(root: Path) -> None:
    """It runs here as it is: it is linked statically."""
    try:
        done = subprocess.run(
            [root / "usr/bin/qemu-aarch64", "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except OSError as error:
        raise RootError(f"the emulator for arm64 does not start: {error.strerror}") from None
    if done.returncode:
        raise RootError(f"the emulator for arm64 does not run: {done.stderr.strip()}")


def _finish(root: Path) -> None:
    """Packages are unpacked, not set up: the folders that every system has merged are still to be linked."""
    for name in ("lib", "bin", "sbin"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    if not (root / "usr/bin/python3").exists():
        raise RootError("the arm64 system has no Python")


if __name__ == "__main__":
    try:
        print(debian_root(SYSTEM, _finish))
    except RootError as problem:
        raise SystemExit(f"error: {problem}") from None
