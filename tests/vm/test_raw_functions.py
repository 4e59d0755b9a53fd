"""The machine's functions besides edu, by both ways into kernel VFIO: nvme, and virtual functions of igb."""

from pathlib import Path

import pytest

from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import igb, nvme
from tools.vm.kernel import KernelName

SCRIPT = "raw_functions.py"
WAYS: dict[KernelName, str] = {"stock": "group", "custom": "cdev"}


@pytest.fixture(scope="module", params=WAYS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home = tmp_path_factory.mktemp("vm")
    image: Path = home / "nvme.img"
    image.touch()
    with open(image, "r+b") as file:
        file.truncate(16 << 20)
    way = WAYS[request.param]
    return vm_checks(SCRIPT, way, folder=home / way, kernel_name=request.param, devices=[nvme(image), igb()])


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_function(outcome: Checks, check: str) -> None:
    outcome.judge(check)
