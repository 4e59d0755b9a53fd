"""Owns the kinds of machines in which a machine moves: the QEMU that migrates our devices, what it boots, two devices.

That QEMU is compiled by `make qemu` only: where it has not been, the lane says so.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vm.inner_files import MEMORY, PERIODIC, inner_files
from tests.vm.kinds import hns, mlx5
from tests.vm.lane import Kind, Plugged
from tools.debian_root import RootError
from tools.qemu_build import found_qemu
from tools.qemu_root import qemu_root
from tools.vm.devices import edu
from tools.vm.machine import Share

PROGRAMS = ("busy", "serial")


def patched(folder: Path) -> Path:
    """The compiled QEMU with this system's loader and the libraries that it uses. RootError if there is none."""
    found = found_qemu()
    if found is None:
        raise RootError("no QEMU with migration for vfio-user has been compiled (make qemu)")
    folder.mkdir()
    program = Path(found.argv[0])
    shutil.copy(program, folder / "qemu-system-x86_64")
    needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    for path in re.findall(r"(/\S+) \(0x", needed):
        shutil.copy(path, folder / Path(path).name)
    return folder


def shares(home: Path) -> list[Share]:
    """Both QEMUs, the compiled one and Debian's, and what the inner machine boots."""
    return [
        Share(qemu_root().path, "/qemu"),
        Share(patched(home / "patched"), "/patched"),
        Share(inner_files(home / "inner", *PROGRAMS), "/inner"),
    ]


@contextmanager
def plugged(home: Path) -> Iterator[Plugged]:
    """Two edus; the kernel makes mttys by itself."""
    yield Plugged([edu(), edu()], shares(home), MEMORY, PERIODIC)


@contextmanager
def hns_plugged(home: Path) -> Iterator[Plugged]:
    """Two ZIP accelerators, PF and VF."""
    with hns(home) as made:
        yield Plugged(made.devices, shares(home))


@contextmanager
def mlx5_plugged(home: Path) -> Iterator[Plugged]:
    """Two ConnectX cards, PF and VF."""
    with mlx5(home) as made:
        yield Plugged(made.devices, shares(home))


MOVING = Kind("moving", "custom", plugged)
MOVING_HNS = Kind("moving-hns", "custom", hns_plugged)
MOVING_MLX5 = Kind("moving-mlx5", "custom", mlx5_plugged)
