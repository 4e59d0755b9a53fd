"""Guest memory behind a real IOMMU, DMA between devices, and a driver's own dirty log, on real kernels."""

import pytest

from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import edu

SCRIPT, LOG = "data_plane.py", "mdev_log.py"
KERNELS = {"group": "stock", "cdev": "custom"}


@pytest.fixture(scope="module", params=KERNELS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    folder, way = tmp_path_factory.mktemp("vm") / request.param, request.param
    return vm_checks(SCRIPT, way, folder=folder, kernel_name=KERNELS[way], devices=[edu(), edu()], timeout=140)


@pytest.fixture(scope="module")
def mdev(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    return vm_checks(LOG, folder=tmp_path_factory.mktemp("vm") / "mdev", kernel_name="custom", devices=[], timeout=90)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_memory(outcome: Checks, check: str) -> None:
    outcome.judge(check)


@pytest.mark.parametrize("check", checks_of(LOG))
def test_mediated_device(mdev: Checks, check: str) -> None:
    mdev.judge(check)
