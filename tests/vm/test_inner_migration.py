"""A machine inside the machine moves from QEMU to QEMU with devices under kernel VFIO, by our server and by vfio-pci.

It takes the QEMU of `make qemu`: `make test-qemu` and `make test-all` run it, `make test-vm` does not.
"""

import pytest

from tests.vm.lane import Machines, Run, each_check
from tests.vm.moving_files import MOVING, MOVING_HNS, MOVING_MLX5

pytestmark = [pytest.mark.slow, pytest.mark.qemu]


@each_check("inner_mtty.py", (MOVING, []))
def test_mtty(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("inner_busy.py", (MOVING, []))
def test_edu(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("inner_hns.py", (MOVING_HNS, []))
def test_hns(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("inner_mlx5.py", (MOVING_MLX5, []))
def test_mlx5(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@each_check("inner_two.py", (MOVING_MLX5, []))
def test_two_devices(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
