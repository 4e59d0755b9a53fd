"""The kernel door and the doctor on functions of a real kernel, by group and by character device."""

from tests.vm.kinds import CDEV, GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("kernel_door.py", (GROUP, ["group"]), (CDEV, ["cdev"]))
def test_door(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
