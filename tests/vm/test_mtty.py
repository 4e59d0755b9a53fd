"""A device that its kernel driver migrates, in the machine: mtty to mtty by our server, to and from a plain program."""

import pytest

from tests.vm.lane import Checks, checks_of, vm_checks

SCRIPT = "mtty.py"


@pytest.fixture(scope="module", params=["group", "cdev"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    folder = tmp_path_factory.mktemp("vm") / request.param
    return vm_checks(SCRIPT, request.param, folder=folder, kernel_name="custom", devices=[], timeout=140)


@pytest.mark.parametrize("check", checks_of(SCRIPT))
def test_mtty(outcome: Checks, check: str) -> None:
    outcome.judge(check)
