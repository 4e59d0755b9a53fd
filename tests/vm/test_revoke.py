"""`--revoke` on a real kernel: a client's mapping of a device at rest is gone, and comes back, by both ways in."""

from tests.vm.kinds import CDEV, GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("revoke.py", (GROUP, []), (CDEV, []))
def test_mapping(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
