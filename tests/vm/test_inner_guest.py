"""A machine inside the machine uses edu, nvme and igb: by our server and vfio-user-pci, and by vfio-pci to compare."""

import pytest

from tests.vm.inner_files import INNER
from tests.vm.lane import Machines, Run, each_check

pytestmark = pytest.mark.slow


@each_check("inner_edu.py", (INNER, []))
def test_edu(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("inner_nvme.py", (INNER, []))
def test_nvme(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("inner_igb.py", (INNER, []))
def test_igb(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
