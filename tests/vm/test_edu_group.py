"""The server on kernel VFIO by group: QEMU's edu in a machine with Debian's own kernel."""

import pytest

from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import edu

SCRIPT = "product_edu.py"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    folder = tmp_path_factory.mktemp("vm") / "group"
    return vm_checks(SCRIPT, "group", folder=folder, kernel_name="stock", devices=[edu()], timeout=140)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_group(outcome: Checks, check: str) -> None:
    outcome.judge(check)
