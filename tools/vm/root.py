"""Owns the Debian userland of the test machine: Python with what the server imports, and tools to look at PCI.

Unpacked from the mirror without root rights and without running anything of the packages. Byte code is compiled here,
natively, and /usr is packed into an image: emulated, compiling costs more than the tests, and reading thousands of
files by 9p twice as much as from a disk. Knows nothing of kernels and machines.
"""

import platform
import subprocess
from pathlib import Path

from tools.debian_root import RootError, RootSpec, debian_root
from tools.qemu_root import PLATFORMS

PYTHON = "python3.13"
IMAGE = "usr.squashfs"
SPEC = RootSpec(
    name="guest",
    suite="trixie",
    packages=(
        "base-files",
        "busybox-static",
        "dash",
        "iproute2",
        "kmod",
        "pciutils",
        "python3",
        "python3-cffi-backend",
        "python3-hypothesis",
        "python3-msgspec",
        "python3-pluggy",
        "python3-rich",
        "python3-trio",
        "squashfs-tools",
    ),
)


def need_x86_64() -> None:
    """Raise RootError elsewhere: kernel, userland and native extension of the machine are this machine's kind."""
    if platform.machine() != "x86_64":
        raise RootError(f"the test machine is an x86-64 one, this is {platform.machine()}")


def guest_root() -> Path:
    """The root, made and verified on first use. Raises RootError with the reason."""
    need_x86_64()
    return debian_root(SPEC, _finish)


def usr_image() -> Path:
    """The root's /usr as a squashfs image, not compressed."""
    return guest_root().with_name(IMAGE)


def foreign(root: Path, program: str, *, name: str = "") -> list[str]:
    """The start of a command line that runs `program` of `root` on this system, by the root's own loader."""
    folder, loader = PLATFORMS["x86_64"]
    libraries = f"{root}/usr/lib/{folder}"
    called = ["--argv0", name] if name else []
    return [str(root / loader), "--library-path", libraries, *called, str(root / program)]


def compile_python(root: Path, *folders: Path, seen_as: str, cut: Path) -> "subprocess.CompletedProcess[str]":
    """Bring the guest's byte code below `folders` up to date; in tracebacks `cut` reads `seen_as`."""
    command = [*foreign(root, f"usr/bin/{PYTHON}"), "-m", "compileall", "-q", "-s", str(cut), "-p", seen_as]
    command += [str(folder) for folder in folders]
    environment = {"PYTHONHOME": str(root / "usr"), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _finish(root: Path) -> None:
    # Where the modules of the kernel that is booted are mounted.
    (root / "usr/lib/modules").mkdir(exist_ok=True)
    compiled = compile_python(root, root / "usr/lib/python3", root / f"usr/lib/{PYTHON}", seen_as="/", cut=root)
    if compiled.returncode:
        raise RootError(f"the guest's Python does not run here: {(compiled.stderr or compiled.stdout).strip()[-300:]}")
    image = str(root.with_name(IMAGE))
    packing = ["-quiet", "-no-progress", "-all-root", "-no-xattrs", "-noI", "-noD", "-noF", "-noX"]
    command = [*foreign(root, "usr/bin/mksquashfs"), str(root / "usr"), image, *packing]
    packed = subprocess.run(command, capture_output=True, text=True, check=False)
    if packed.returncode:
        raise RootError(f"mksquashfs failed: {(packed.stderr or packed.stdout).strip()[-300:]}")
