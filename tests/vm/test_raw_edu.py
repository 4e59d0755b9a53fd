"""Kernel VFIO in the machine without the product: QEMU's edu, and our model of it plugged in from outside."""

from tests.vm.kinds import CDEV, GROUP, MODEL
from tests.vm.lane import Machines, Run, each_check


@each_check("raw_edu.py", (GROUP, ["group"]), (CDEV, ["cdev"]), (MODEL, ["cdev", "model"]))
def test_kernel(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
