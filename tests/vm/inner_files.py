"""Owns the kinds of machines that bring programs along: QEMU and what boots in a machine inside, Linux's own tests."""

import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.model_process import ModelProcess
from tests.vm.kinds import image
from tests.vm.lane import Kind, Plugged
from tools.qemu_root import qemu_root
from tools.vm.devices import edu, igb, nvme, vfio_user
from tools.vm.initramfs import Cpio
from tools.vm.kernel import kernel
from tools.vm.machine import Share
from tools.vm.selftests import selftests

PROGRAMS = Path(__file__).with_name("inner")
USED = ("edu", "nvme", "igb", "selftests")
# Linux's tests that need more than a function.
NOT_FOR_ALL = ("vfio_pci_driver_test", "vfio_pci_sriov_uapi_test")
IMAGE = 2 << 20
# While the machine below stalls, an emulated processor that runs a machine inside now and then gets a timer's event
# minutes late. A periodic timer goes on.
PERIODIC = "nohz=off highres=off"
MEMORY = 1280


def inner_files(folder: Path, *names: str) -> Path:
    """The inner machine's kernel, and for each of the programs an initial memory file system with the program alone."""
    folder.mkdir()
    for name in names:
        source = PROGRAMS / f"{name}_init.c"
        program = folder / name
        subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(program), str(source)], check=True)
        cpio = Cpio()
        cpio.add("dev", stat.S_IFDIR | 0o755)
        cpio.add("init", stat.S_IFREG | 0o755, program.read_bytes())
        if name == "selftests":
            cpio.add(name, stat.S_IFDIR | 0o755)
            for path in sorted(selftests().iterdir()):
                if path.name not in NOT_FOR_ALL:
                    cpio.add(f"{name}/{path.name}", stat.S_IFREG | 0o755, path.read_bytes())
        (folder / f"{name}.initrd").write_bytes(cpio.finish())
    shutil.copy(kernel("custom").image, folder / "bzImage")
    return folder


@contextmanager
def plugged(home: Path) -> Iterator[Plugged]:
    """One function of each sort that the inner machine is given."""
    shares = [Share(qemu_root().path, "/qemu"), Share(inner_files(home / "inner", *USED), "/inner")]
    yield Plugged([edu(), nvme(image(home, IMAGE)), igb()], shares, MEMORY, PERIODIC)


@contextmanager
def with_selftests(home: Path) -> Iterator[Plugged]:
    """One function of each sort, one of them a model of ours that runs outside, and Linux's own tests."""
    with ModelProcess(home, "ioat") as served:
        devices = [edu(), nvme(image(home)), igb(), vfio_user(served.path)]
        yield Plugged(devices, [Share(selftests(), "/selftests")])


INNER = Kind("inner", "custom", plugged)
SELFTESTS = Kind("selftests", "custom", with_selftests)
