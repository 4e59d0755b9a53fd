"""The vendors' plugins on kernel VFIO: their models' PF and VF as PCI functions, two pairs, and a VF that moves."""

from tests.vm.kinds import HNS_CDEV, HNS_GROUP, MLX5_CDEV, MLX5_GROUP
from tests.vm.lane import Machines, Run, each_check


@each_check("vendor_mlx5.py", (MLX5_CDEV, ["cdev"]), (MLX5_GROUP, ["group"]))
def test_mlx5(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("vendor_hns.py", (HNS_CDEV, ["cdev"]), (HNS_GROUP, ["group"]))
def test_hns(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
