"""Checks in the test machine that its other functions are there for tests: `raw_functions.py group|cdev`.

A controller with queues, a reset and MSI-X (nvme), and virtual functions of a network card (igb), without the product.
"""

import subprocess
import sys

from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.raw_vfio import MSIX, CdevDevice, GroupDevice

DOOR = {"group": GroupDevice, "cdev": CdevDevice}[sys.argv[1]]
NVME_VERSION, NVME_STATUS = 0x08, 0x1C
IGBVF_STATUS, LINK_UP = 0x08, 0x2


def check_nvme() -> None:
    bdf = pci.only(pci.NVME)
    pci.bind(bdf)
    equal(pci.group_members(bdf), [bdf], "members of the group")
    with DOOR(bdf) as device:
        device.enable()
        device.reset()
        device.enable()
        equal(device.read(0, NVME_VERSION, 4) >> 16, 1, "major version")
        equal(device.read(0, NVME_STATUS, 4) & 1, 0, "ready bit before it is enabled")
        equal(device.irq_count(MSIX) > 1, True, "more than one message")


def check_igb_has_virtual_functions() -> None:
    card = pci.only(pci.IGB)
    subprocess.run(["modprobe", "-q", "igb"], stderr=subprocess.DEVNULL, check=False)
    if pci.driver(card) != "igb":
        pci.bind(card, "igb")
    (pci.DEVICES / card / "sriov_numvfs").write_text("2")
    functions = pci.find(pci.IGB_VF)
    equal(len(functions), 2, "virtual functions")
    for bdf in functions:
        pci.bind(bdf)
        equal(pci.group_members(bdf), [bdf], "members of the group")
        with DOOR(bdf) as device:
            device.enable()
            device.reset()
            device.enable()
            equal(device.region(0)[0], 0x4000, "size of BAR 0")
            equal(device.irq_count(MSIX), 3, "messages")
            equal(device.read(0, IGBVF_STATUS, 4) & ~LINK_UP & 1, 1, "full duplex in the status register")


checks.run(globals())
