"""What holds for every test in this folder: it boots a machine, and has the time for that."""

from pathlib import Path

import pytest

from tools.vm.kernel import KERNELS, is_made

HERE = Path(__file__).resolve().parent
# A kernel that has to be compiled first takes minutes, and no test can help it.
COMPILING, RUNNING = 3600, 150
collect_ignore = ["guest"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; the hook is called with those of all folders."""
    seconds = RUNNING if all(map(is_made, KERNELS)) else COMPILING
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.deadline(seconds))
