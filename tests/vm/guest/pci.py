"""Owns PCI functions as sysfs shows them in the test machine: found by id, bound to a driver and taken from it."""

import os
import subprocess
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
EDU = (0x1234, 0x11E8)
NVME = (0x1B36, 0x0010)
E1000E = (0x8086, 0x10D3)
IGB = (0x8086, 0x10C9)
IGB_VF = (0x8086, 0x10CA)


def find(ids: tuple[int, int]) -> list[str]:
    """The addresses of all functions with this vendor and device id, sorted."""
    return sorted(path.name for path in DEVICES.iterdir() if _ids(path) == ids)


def only(ids: tuple[int, int]) -> str:
    """The address of the one function with these ids."""
    (bdf,) = find(ids)
    return bdf


def driver(bdf: str) -> str:
    """The driver that has the function, or nothing."""
    link = DEVICES / bdf / "driver"
    return link.readlink().name if link.is_symlink() else ""


def bind(bdf: str, name: str = "vfio-pci") -> None:
    """Give the function to driver `name`, whoever has it now."""
    subprocess.run(["modprobe", "-q", name], check=False)
    unbind(bdf)
    (DEVICES / bdf / "driver_override").write_text(name)
    Path("/sys/bus/pci/drivers_probe").write_text(bdf)
    if driver(bdf) != name:
        raise AssertionError(f"{bdf} is bound to {driver(bdf) or 'nothing'}, not to {name}")


def unbind(bdf: str) -> None:
    """Take the function from its driver."""
    if driver(bdf):
        (DEVICES / bdf / "driver" / "unbind").write_text(bdf)


def group(bdf: str) -> str:
    """The number of its IOMMU group."""
    return (DEVICES / bdf / "iommu_group").readlink().name


def group_members(bdf: str) -> list[str]:
    """Who shares its IOMMU group, itself included."""
    return sorted(os.listdir(DEVICES / bdf / "iommu_group" / "devices"))


def _ids(path: Path) -> tuple[int, int]:
    return int((path / "vendor").read_text(), 16), int((path / "device").read_text(), 16)
