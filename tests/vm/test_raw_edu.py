"""Kernel VFIO in the machine without the product: QEMU's edu, and our model of it plugged in from outside."""

import pytest

from tests.model_process import ModelProcess
from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import edu, vfio_user

SCRIPT = "raw_edu.py"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    folder = tmp_path_factory.mktemp("vm") / "stock"
    return vm_checks(SCRIPT, "group", folder=folder, kernel_name="stock", devices=[edu()])


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    folder = tmp_path_factory.mktemp("vm") / "custom"
    return vm_checks(SCRIPT, "cdev", folder=folder, kernel_name="custom", devices=[edu()])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home = tmp_path_factory.mktemp("vm")
    with ModelProcess(home, "edu", time_scale=1.0) as served:
        devices = [vfio_user(served.path)]
        return vm_checks(SCRIPT, "cdev", "model", folder=home / "model", kernel_name="custom", devices=devices)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_group(stock: Checks, check: str) -> None:
    stock.judge(check)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_cdev(custom: Checks, check: str) -> None:
    custom.judge(check)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_model_from_outside(model: Checks, check: str) -> None:
    model.judge(check)
