"""The server sleeps while a device works: its wake-ups over many interrupts and mapped doorbells, by both ways in."""

from pathlib import Path

import pytest

from tests.vm.lane import Checks, checks_of, vm_checks
from tools.vm.devices import nvme

SCRIPT = "wakeups.py"
KERNELS = {"group": "stock", "cdev": "custom"}
COUNT = 100_000
SECONDS = 230
IMAGE = 1 << 20


@pytest.fixture(scope="module", params=KERNELS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    home: Path = tmp_path_factory.mktemp("vm")
    image = home / "nvme.img"
    image.write_bytes(bytes(IMAGE))
    folder, way = home / request.param, request.param
    found = vm_checks(
        SCRIPT, str(COUNT), folder=folder, kernel_name=KERNELS[way], devices=[nvme(image)], timeout=SECONDS
    )
    report = folder / "results" / "wakeups"
    print(report.read_text() if report.exists() else "no report")
    return found


@pytest.mark.deadline(SECONDS + 20)
@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_server_sleeps(outcome: Checks, check: str) -> None:
    outcome.judge(check)
