"""A machine inside the machine uses edu and nvme: by our server and vfio-user-pci, and by vfio-pci to compare."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.lanes import lane_unavailable
from tests.vm.lane import Checks, checks_of, vm_checks
from tools.debian_root import RootError
from tools.qemu_root import qemu_root
from tools.vm.devices import Device, edu, nvme
from tools.vm.initramfs import Cpio
from tools.vm.kernel import kernel
from tools.vm.machine import Share

SCRIPTS = {"edu": "inner_edu.py", "nvme": "inner_nvme.py"}
PROGRAMS = Path(__file__).with_name("inner")
IMAGE = 2 << 20
MEMORY = 1536
SECONDS = 360
# Two boots of a machine in an emulated one, twice. On the tests themselves, else the folder's limit would come first.
patient = pytest.mark.deadline(SECONDS + 30)
pytestmark = pytest.mark.slow


def inner_files(folder: Path, name: str) -> Path:
    """The inner machine's kernel, and an initial memory file system with the program alone."""
    folder.mkdir()
    program, source = folder / "init", PROGRAMS / f"{name}_init.c"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(program), str(source)], check=True)
    cpio = Cpio()
    cpio.add("dev", stat.S_IFDIR | 0o755)
    cpio.add("init", stat.S_IFREG | 0o755, program.read_bytes())
    (folder / "initrd").write_bytes(cpio.finish())
    shutil.copy(kernel("custom").image, folder / "bzImage")
    return folder


def used(home: Path, name: str, device: Device) -> Checks:
    """The checks of the inner machine with one device."""
    try:
        shares = [Share(qemu_root().path, "/qemu"), Share(inner_files(home / "inner", name), "/inner")]
    except RootError as error:
        lane_unavailable(str(error))
    folder, options = home / name, {"shares": shares, "memory": MEMORY}
    return vm_checks(SCRIPTS[name], folder=folder, kernel_name="custom", devices=[device], timeout=SECONDS, **options)


@pytest.fixture(scope="module")
def with_edu(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    return used(tmp_path_factory.mktemp("vm"), "edu", edu())


@pytest.fixture(scope="module")
def with_nvme(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home: Path = tmp_path_factory.mktemp("vm")
    image = home / "nvme.img"
    image.write_bytes(bytes(IMAGE))
    return used(home, "nvme", nvme(image))


@patient
@pytest.mark.parametrize("check", checks_of(SCRIPTS["edu"]))
def test_edu(with_edu: Checks, check: str) -> None:
    with_edu.judge(check)


@patient
@pytest.mark.parametrize("check", checks_of(SCRIPTS["nvme"]))
def test_nvme(with_nvme: Checks, check: str) -> None:
    with_nvme.judge(check)
