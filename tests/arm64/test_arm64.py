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


def run(system: Arm64, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """That system's Python in `folder`, until it has ended."""
    environment = {**os.environ, **system.environment}
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


def passes(system: Arm64, folder: Path, *what: str) -> None:
    without = [f"--deselect={test}" for test in OF_THE_EMULATOR]
    done = run(
        system, folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not vm", *without, *what
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
