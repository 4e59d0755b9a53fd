"""The machine's functions besides edu, by both ways into kernel VFIO: nvme, and virtual functions of igb."""

from tests.vm.kinds import CDEV, GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("raw_functions.py", (GROUP, ["group"]), (CDEV, ["cdev"]))
def test_function(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
