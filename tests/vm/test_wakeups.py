"""The server sleeps while a device works: its wake-ups over many interrupts and mapped doorbells, by both ways in."""

from tests.vm.kinds import CDEV, GROUP
from tests.vm.lane import Machines, Run, each_check

COUNT = 100_000


@each_check("wakeups.py", (GROUP, [str(COUNT)]), (CDEV, [str(COUNT)]))
def test_server_sleeps(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
