"""Functions presented by the plugin vfio and used: nvme with its queues, a virtual function of igb with its card."""

from tests.vm.kinds import CDEV, GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("functions_used.py", (GROUP, []), (CDEV, []))
def test_function(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
