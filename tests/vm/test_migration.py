"""edu moves from one server to another, both on kernel VFIO: two functions of one machine, by group and by cdev."""

from tests.vm.kinds import PAIR_CDEV, PAIR_GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("product_migration.py", (PAIR_GROUP, []), (PAIR_CDEV, []))
def test_migration(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
