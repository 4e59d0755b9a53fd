"""examples/e1000e, a plugin from outside of our tree, on kernel VFIO: QEMU's own functions, at work while they move."""

from tests.vm.kinds import E1000E_CDEV, E1000E_GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("example_e1000e.py", (E1000E_GROUP, ["group"]), (E1000E_CDEV, ["cdev"]))
def test_e1000e(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("example_e1000e_driver.py", (E1000E_GROUP, []))
def test_e1000e_and_the_kernels_driver(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
