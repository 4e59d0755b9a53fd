"""What /sys says of a PCI function: ids, driver, IOMMU group and its members, VFIO nodes, memory node.

All paths lie under an injectable root. It reads, and judges nothing; nodes under /dev are only named.
"""

import errno
import platform
from dataclasses import dataclass
from pathlib import Path

from vfu_server.errors import HostError

# Drivers that leave DMA alone, so that the rest of a group can be given away (driver_managed_dma in the kernel).
HARMLESS_DRIVERS = frozenset({"pci-stub", "pcieport", "shpchp"})


@dataclass(frozen=True, slots=True)
class Function:
    """One PCI function. Empty strings and -1 stand for what it does not have."""

    bdf: str
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    revision: int
    class_code: int
    modalias: str
    driver: str
    group: int
    vfio_device: str
    """`vfioN`, once a VFIO driver has it (kernels since 6.1)."""
    numa_node: int
    physical_function: str
    """BDF of the PF, for a VF."""
    reset_methods: tuple[str, ...]
    mdev_type: str = ""
    """`mtty-2`, for a mediated device: then `bdf` is its UUID, the IOMMU is its driver, and ids are not known here."""

    @property
    def is_bridge(self) -> bool:
        """A PCI bridge: the kernel does not give it to user space."""
        return self.class_code >> 8 in (0x0604, 0x0609)

    @property
    def on_vfio(self) -> bool:
        """A VFIO driver has it: vfio-pci or a variant of it, or that of a mediated device."""
        return bool(self.vfio_device) or "vfio" in self.driver or bool(self.mdev_type and self.driver)

    @property
    def blocks_group(self) -> bool:
        """Its driver keeps the whole IOMMU group from user space."""
        return bool(self.driver) and not self.on_vfio and self.driver not in HARMLESS_DRIVERS


class Sysfs:
    """The reader. `root` is / but in a test."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def path(self, path: str) -> Path:
        """An absolute path, under the root."""
        return self.root / path.lstrip("/")

    def function(self, bdf: str) -> Function:
        """What there is of a function. HostError ENODEV if there is none at that address."""
        folder = self._folder(bdf)
        if not folder.is_dir():
            absent = HostError(f"there is no PCI function {bdf}", errno.ENODEV)
            absent.add_note("lspci -D, for those that there are; echo 1 > /sys/bus/pci/rescan, to look again")
            raise absent
        return Function(
            bdf=bdf,
            vendor=self._number(folder / "vendor"),
            device=self._number(folder / "device"),
            subsystem_vendor=self._number(folder / "subsystem_vendor"),
            subsystem=self._number(folder / "subsystem_device"),
            revision=self._number(folder / "revision"),
            class_code=self._number(folder / "class"),
            modalias=_text(folder / "modalias"),
            driver=_link_name(folder / "driver"),
            group=_group_number(folder / "iommu_group"),
            vfio_device=self._vfio_device(folder),
            numa_node=self._number(folder / "numa_node", -1),
            physical_function=_link_name(folder / "physfn"),
            reset_methods=tuple(_text(folder / "reset_method").split()),
        )

    def mdev(self, uuid: str) -> Function:
        """What there is of a mediated device. HostError ENODEV if there is none of that UUID."""
        folder = self.path(f"/sys/bus/mdev/devices/{uuid}")
        if not folder.is_dir():
            absent = HostError(f"there is no mediated device {uuid}", errno.ENODEV)
            absent.add_note("ls /sys/class/mdev_bus/*/mdev_supported_types, for the types that there are")
            absent.add_note(f"echo {uuid} > /sys/class/mdev_bus/PARENT/mdev_supported_types/TYPE/create")
            raise absent
        return Function(
            bdf=uuid,
            vendor=0,
            device=0,
            subsystem_vendor=0,
            subsystem=0,
            revision=0,
            class_code=0,
            modalias="",
            driver=_link_name(folder / "driver"),
            group=_group_number(folder / "iommu_group"),
            vfio_device=self._vfio_device(folder),
            numa_node=-1,
            physical_function="",
            reset_methods=(),
            mdev_type=_link_name(folder / "mdev_type") or "of an unknown type",
        )

    def members(self, group: int) -> list[Function]:
        """All functions of an IOMMU group, by address."""
        folder = self.path(f"/sys/kernel/iommu_groups/{group}/devices")
        return [self.function(name) for name in sorted(_names(folder)) if self._folder(name).is_dir()]

    def group_name(self, group: int) -> str:
        """`vfio-noiommu` for a group that stands for no IOMMU at all; else mostly empty."""
        return _text(self.path(f"/sys/kernel/iommu_groups/{group}/name"))

    def iommus(self) -> list[str]:
        """IOMMUs that the kernel has switched on: dmar0, ivhd0, smmu3.0x..., by name."""
        return sorted(_names(self.path("/sys/class/iommu")))

    def module_parameter(self, module: str, name: str) -> str:
        """A parameter of a kernel module that is loaded or built in, or nothing."""
        return _text(self.path(f"/sys/module/{module}/parameters/{name}"))

    def kernel_release(self) -> str:
        """`uname -r`."""
        return _text(self.path("/proc/sys/kernel/osrelease")) or platform.release()

    def kernel_options(self) -> dict[str, str]:
        """CONFIG_ options by name, where the distribution tells them; empty otherwise."""
        text = _text(self.path(f"/boot/config-{self.kernel_release()}"))
        pairs = (line.split("=", 1) for line in text.splitlines() if line.startswith("CONFIG_") and "=" in line)
        return {name: value.strip('"') for name, value in pairs}

    def command_line(self) -> str:
        """Of the kernel."""
        return _text(self.path("/proc/cmdline"))

    def processor_vendor(self) -> str:
        """`GenuineIntel`, `AuthenticAMD`; empty on others."""
        for line in _text(self.path("/proc/cpuinfo")).splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "vendor_id":
                return value.strip()
        return ""

    def module_aliases(self) -> list[str]:
        """Lines of modules.alias of the running kernel."""
        return _text(self.path(f"/lib/modules/{self.kernel_release()}/modules.alias")).splitlines()

    def _folder(self, bdf: str) -> Path:
        return self.path(f"/sys/bus/pci/devices/{bdf}")

    @staticmethod
    def _number(path: Path, default: int = 0) -> int:
        try:
            return int(_text(path), 0)
        except ValueError:
            return default

    @staticmethod
    def _vfio_device(folder: Path) -> str:
        return next((name for name in sorted(_names(folder / "vfio-dev")) if name.startswith("vfio")), "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _link_name(path: Path) -> str:
    try:
        return path.readlink().name
    except OSError:
        return ""


def _group_number(path: Path) -> int:
    name = _link_name(path)
    return int(name) if name.isdecimal() else -1
