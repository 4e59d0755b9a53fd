"""A function is presented as it is: our config space against kernel VFIO's own, access by access, by both ways in."""

import random
from pathlib import Path

import pytest

from tests.vm.guest.functions import option_rom
from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import Device, igb, nvme

SCRIPT = "as_it_is.py"
KERNELS = {"group": "stock", "cdev": "custom"}
IMAGE = 1 << 20


def edu_with_rom(rom: Path) -> Device:
    """QEMU's edu with an option ROM, which is what `rom` has."""
    return Device(("-device", f"edu,addr={{slot}},romfile={rom}"))


@pytest.fixture(scope="module", params=KERNELS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home: Path = tmp_path_factory.mktemp("vm")
    image, rom = home / "nvme.img", home / "rom"
    image.write_bytes(bytes(IMAGE))
    seed = random.randrange(1 << 32)
    rom.write_bytes(option_rom(seed))
    devices = [edu_with_rom(rom), nvme(image), igb()]
    way = request.param
    folder = home / way
    return vm_checks(SCRIPT, way, str(seed), folder=folder, kernel_name=KERNELS[way], devices=devices, timeout=140)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_function(outcome: Checks, check: str) -> None:
    outcome.judge(check)
