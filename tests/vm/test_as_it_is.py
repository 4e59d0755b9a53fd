"""A function is presented as it is: our config space against kernel VFIO's own, access by access, by both ways in."""

from tests.vm.kinds import SEED, VISITED_CDEV, VISITED_GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("as_it_is.py", (VISITED_GROUP, ["group", str(SEED)]), (VISITED_CDEV, ["cdev", str(SEED)]))
def test_function(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
