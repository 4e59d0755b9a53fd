"""edu moves from one server to another, both on kernel VFIO: two functions of one machine, by group and by cdev."""

from pathlib import Path

import pytest

from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import edu

SCRIPT = "product_migration.py"
KERNELS = {"group": "stock", "cdev": "custom"}


@pytest.fixture(scope="module", params=KERNELS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home: Path = tmp_path_factory.mktemp("vm")
    way = request.param
    return vm_checks(SCRIPT, folder=home / way, kernel_name=KERNELS[way], devices=[edu(), edu()], timeout=145)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_migration(outcome: Checks, check: str) -> None:
    outcome.judge(check)
