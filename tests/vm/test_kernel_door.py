"""The kernel door and the doctor on functions of a real kernel, by group and by character device."""

from pathlib import Path

import pytest

from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import Device, edu, igb, nvme

SCRIPT = "kernel_door.py"
KERNELS = {"group": "stock", "cdev": "custom"}
IMAGE = 1 << 20
BRIDGED = Device(
    ("-device", "pci-bridge,id=bridge{slot},chassis_nr=2,addr={slot}", "-device", "e1000,bus=bridge{slot},addr=1")
)


@pytest.fixture(scope="module", params=KERNELS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home: Path = tmp_path_factory.mktemp("vm")
    image = home / "nvme.img"
    image.write_bytes(bytes(IMAGE))
    way = request.param
    devices = [edu(), nvme(image), igb(), BRIDGED]
    return vm_checks(SCRIPT, way, folder=home / way, kernel_name=KERNELS[way], devices=devices, timeout=140)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_door(outcome: Checks, check: str) -> None:
    outcome.judge(check)
