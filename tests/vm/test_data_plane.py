"""Guest memory behind a real IOMMU, DMA between devices, and a driver's own dirty log, on real kernels."""

from tests.vm.kinds import PAIR_CDEV, PAIR_GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("data_plane.py", (PAIR_GROUP, ["group"]), (PAIR_CDEV, ["cdev"]))
def test_memory(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("mdev_log.py", (PAIR_CDEV, []))
def test_mediated_device(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
