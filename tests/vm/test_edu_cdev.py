"""The server on kernel VFIO by character device and iommufd: QEMU's edu, and our model of it as a PCI device.

The model runs outside and is plugged in with vfio-user-pci, so the machine's kernel has it behind its IOMMU as any
other function, and one more vfio-user server, ours, stands below the one that is tested.
"""

import pytest

from tests.model_process import ModelProcess
from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import edu, vfio_user

SCRIPT = "product_edu.py"
SECONDS = 140


@pytest.fixture(scope="module")
def qemus(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    folder = tmp_path_factory.mktemp("vm") / "cdev"
    return vm_checks(SCRIPT, "cdev", folder=folder, kernel_name="custom", devices=[edu()], timeout=SECONDS)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home = tmp_path_factory.mktemp("vm")
    with ModelProcess(home, "edu", time_scale=1.0) as served:
        devices = [vfio_user(served.path)]
        folder = home / "cdev-model"
        return vm_checks(SCRIPT, "cdev", "model", folder=folder, kernel_name="custom", devices=devices, timeout=SECONDS)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_qemus_edu(qemus: Checks, check: str) -> None:
    qemus.judge(check)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_our_model(ours: Checks, check: str) -> None:
    ours.judge(check)
