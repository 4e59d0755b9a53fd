"""On arm64: the extension builds there, and what talks to hardware passes its tests, under user-mode emulation.

What an emulator answers in the kernel's place is not tested; what the processor does differently is: the store of 16
bytes, the order of memory, the sizes of structures.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.lanes import lane_unavailable
from tools.arm64_root import Arm64, RootError, arm64

TREE = Path(__file__).resolve().parents[2]
SECONDS = 3000
"""For one program: a tenth of the machine's speed, on a machine that others use as well."""
OF_THE_EMULATOR = ("tests/host/test_kernel_door.py::test_guest_memory_is_not_dumped",)
"""It makes up what /proc tells of a process's memory."""

pytestmark = [pytest.mark.slow, pytest.mark.deadline(2 * SECONDS)]


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Arm64:
    try:
        return arm64(tmp_path_factory.mktemp("arm64"))
    except RootError as error:
        lane_unavailable(str(error))


@pytest.fixture(scope="module")
def tree(tmp_path_factory, system) -> Path:
    """This tree's files in a folder of their own, with the extension built there."""
    folder = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=TREE, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (TREE / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((TREE / name).read_bytes())
    done = run(system, folder, "-m", "vfu_server.libvfio_user.build")
    assert done.returncode == 0, done.stdout
    assert "built the native extension" in done.stdout
    return folder


@pytest.fixture(scope="module")
def large_pages(tmp_path_factory, system, tree) -> dict[str, str]:
    """Environment in which programs see pages of 64 KiB: most of these processors' kernels can have them."""
    built = tmp_path_factory.mktemp("pages") / "pages.so"
    command = [system.cc, "-shared", "-fPIC", "-O2", "-o", built, tree / "tests/pages/pages.c", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    # The emulator's own environment has it not: there it is a library of another processor.
    return {"QEMU_SET_ENV": f"LD_PRELOAD={built}", "VFU_TEST_PAGE": str(64 << 10)}


def run(system: Arm64, folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """That system's Python in `folder`, until it has ended. `more`: environment."""
    environment = {**os.environ, **system.environment, **more}
    return subprocess.run(
        [system.python, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def passes(system: Arm64, folder: Path, *what: str, **more: str) -> None:
    without = [f"--deselect={test}" for test in OF_THE_EMULATOR]
    done = run(
        system,
        folder,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not vm",
        *without,
        *what,
        **more,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_it_is_that_processor(system, tree):
    done = run(system, tree, "-c", "import platform; print(platform.machine())")
    assert done.stdout == "aarch64\n"
    extension = next((tree / "vfu_server/libvfio_user").glob("_native*.so")).read_bytes()
    assert extension[:5] == b"\x7fELF\x02"
    assert int.from_bytes(extension[18:20], "little") == 183  # EM_AARCH64


def test_registers_and_words(system, tree):
    passes(system, tree, "tests/host/test_kernel_door.py", "tests/plugins/hns/test_words.py")


def test_the_host_lane(system, tree):
    """All of it but the doctor, which looks at a machine and at no device."""
    passes(system, tree, "tests/host", "--ignore=tests/host/test_doctor.py")


ACCELERATORS = (
    "tests/pages/test_places.py",
    "tests/plugins/hns/test_restore.py",
    "tests/plugins/hns/test_dirty.py::test_memory_is_whole_after_each_of_many_migrations[3-iommu]",
)
"""What goes through the kernel's door in this process: mailbox commands are real store pairs. Whole servers and models
beside them are too slow here for their tests' deadlines."""


def test_an_accelerator_under_load_moves(system, tree):
    passes(system, tree, *ACCELERATORS)


def test_an_accelerator_under_load_moves_on_a_host_with_large_pages(system, tree, large_pages):
    done = run(system, tree, "-c", "import mmap; print(mmap.PAGESIZE)", **large_pages)
    assert done.stdout == f"{64 << 10}\n"
    passes(system, tree, *ACCELERATORS, **large_pages)
