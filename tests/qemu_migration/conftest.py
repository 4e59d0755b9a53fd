"""What holds for every test in this folder: it needs the QEMU of tools/qemu_build.py, and has time."""

from pathlib import Path

import pytest

from tests.lanes import lane_unavailable
from tools.debian_root import RootError
from tools.qemu_build import found_qemu
from tools.qemu_root import QemuRoot

HERE = Path(__file__).resolve().parent
SECONDS = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; the hook is called with those of all folders."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.qemu)
            item.add_marker(pytest.mark.deadline(SECONDS))


@pytest.fixture(scope="session")
def qemu() -> QemuRoot:
    """The patched QEMU, compiled before."""
    try:
        found = found_qemu()
    except RootError as error:
        lane_unavailable(str(error))
    if found is None:
        lane_unavailable("no QEMU with migration for vfio-user has been compiled (make qemu)")
    return found
