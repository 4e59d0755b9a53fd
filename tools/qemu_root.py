"""Owns the QEMU that tests run against: Debian's 11.1 or newer, which has `vfio-user-pci`, in a root of its own.

Nothing is installed into this system and nothing is entered by chroot: the root's own loader starts its QEMU from here.
Run as a program it prints the root's path.
"""

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.debian_root import RootError, RootSpec, debian_root

OLDEST = (11, 1)
DEVICE = "vfio-user-pci"
# seabios is pinned as well because the backported QEMU depends on the backported one.
SPEC = RootSpec(
    name="qemu",
    suite="trixie",
    packages=(),
    pinned=("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"),
)
# Machine -> multiarch folder, loader below the root.
PLATFORMS = {
    "x86_64": ("x86_64-linux-gnu", "usr/lib64/ld-linux-x86-64.so.2"),
    "aarch64": ("aarch64-linux-gnu", "usr/lib/ld-linux-aarch64.so.1"),
}


@dataclass(frozen=True, slots=True)
class QemuRoot:
    """How to run it: `argv` comes before QEMU's own arguments, `environment` is added to the caller's."""

    path: Path
    argv: tuple[str, ...]
    environment: dict[str, str]


def qemu_root() -> QemuRoot:
    """The root, made and verified on first use (seconds, 180 MB in the cache). Raises RootError with the reason."""
    if platform.machine() not in PLATFORMS:
        raise RootError(f"no QEMU root for {platform.machine()}, only for {', '.join(PLATFORMS)}")
    return _describe(debian_root(SPEC, _verify))


def _describe(root: Path) -> QemuRoot:
    folder, loader = PLATFORMS[platform.machine()]
    libraries = root / "usr/lib" / folder
    argv = (
        str(root / loader),
        "--library-path",
        str(libraries),
        str(root / "usr/bin/qemu-system-x86_64"),
        *("-L", str(root / "usr/share/qemu")),
        *("-L", str(root / "usr/share/seabios")),
    )
    return QemuRoot(root, argv, {"QEMU_MODULE_DIR": str(libraries / "qemu")})


def version(qemu: QemuRoot) -> tuple[int, ...]:
    """QEMU's version as numbers."""
    found = re.search(r"version (\d+(?:\.\d+)*)", _ask(qemu, "--version"))
    return tuple(int(number) for number in found[1].split(".")) if found else ()


def _verify(root: Path) -> None:
    """QEMU runs, is new enough and has the device."""
    qemu = _describe(root)
    if version(qemu) < OLDEST:
        raise RootError(f"the mirror's QEMU is {'.'.join(map(str, version(qemu)))}, wanted is 11.1 or newer")
    if not _ask(qemu, "-device", f"{DEVICE},help").startswith(f"{DEVICE} options"):
        raise RootError(f"the mirror's QEMU has no {DEVICE}")


def _ask(qemu: QemuRoot, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [*qemu.argv, *arguments], env=qemu.environment, capture_output=True, text=True, timeout=60, check=False
        )
    except OSError as error:
        raise RootError(f"QEMU in {qemu.path} does not start: {error.strerror}") from None
    if done.returncode:
        raise RootError(f"QEMU in {qemu.path} failed: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(qemu_root().path)
    except RootError as problem:
        raise SystemExit(f"error: {problem}") from None
