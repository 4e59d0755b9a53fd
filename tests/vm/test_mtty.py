"""A device that its kernel driver migrates, in the machine: mtty to mtty by our server, to and from a plain program."""

from tests.vm.kinds import PAIR_CDEV
from tests.vm.lane import Machines, Run, each_check


@each_check("mtty.py", (PAIR_CDEV, ["group"]), (PAIR_CDEV, ["cdev"]))
def test_mtty(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
