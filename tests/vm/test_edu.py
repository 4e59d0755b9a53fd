"""The server on kernel VFIO: QEMU's edu by group and by character device, and our model of it as a PCI device.

The model runs outside and is plugged in with vfio-user-pci, so the machine's kernel has it behind its IOMMU as any
other function, and one more vfio-user server, ours, stands below the one that is tested.
"""

from tests.vm.kinds import CDEV, GROUP, MODEL
from tests.vm.lane import Machines, Run, each_check


@each_check("product_edu.py", (GROUP, ["group"]), (CDEV, ["cdev"]), (MODEL, ["cdev", "model"]))
def test_server(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
