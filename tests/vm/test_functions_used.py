"""Functions presented by the plugin vfio and used: nvme with its queues, a virtual function of igb with its card."""

from pathlib import Path

import pytest

from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import edu, igb, nvme

SCRIPT = "functions_used.py"
KERNELS = {"group": "stock", "cdev": "custom"}
IMAGE = 1 << 20


@pytest.fixture(scope="module", params=KERNELS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home: Path = tmp_path_factory.mktemp("vm")
    image = home / "nvme.img"
    image.write_bytes(bytes(IMAGE))
    way = request.param
    devices = [edu(), nvme(image), igb()]
    return vm_checks(SCRIPT, folder=home / way, kernel_name=KERNELS[way], devices=devices, timeout=145)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_function(outcome: Checks, check: str) -> None:
    outcome.judge(check)
