"""Makes a /sys, /proc and /dev for tests, below any folder: PCI functions, their IOMMU groups and VFIO nodes."""

import os
from pathlib import Path

RELEASE = "6.12.0-test"
DMAR = "dmar0"


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


class Machine:
    """A machine with an IOMMU and nothing else. `root` is its root folder."""

    def __init__(self, root: Path, *, iommu: str = DMAR, cmdline: str = "quiet", processor: str = "GenuineIntel"):
        self.root = root
        self.functions: list[str] = []
        write(root / "proc/sys/kernel/osrelease", RELEASE + "\n")
        write(root / "proc/cmdline", cmdline + "\n")
        write(root / "proc/cpuinfo", f"processor\t: 0\nvendor_id\t: {processor}\n")
        self.capabilities("000001ffffffffff")
        (root / "sys/bus/pci/devices").mkdir(parents=True)
        (root / "sys/class/iommu").mkdir(parents=True)
        if iommu:
            (root / "sys/class/iommu" / iommu).mkdir()

    def capabilities(self, effective: str) -> None:
        write(self.root / "proc/self/status", f"Name:\ttest\nCapEff:\t{effective}\n")

    def function(
        self,
        bdf: str,
        *,
        driver: str = "vfio-pci",
        group: int = 7,
        cdev: str = "",
        ids: tuple[int, int] = (0x1234, 0x11E8),
        class_code: int = 0x00FF00,
        parent: str = "",
        reset: str = "",
        numa: int = -1,
        group_name: str = "",
    ) -> Path:
        """Add a function; `cdev` ('vfio0') and `driver` as a VFIO driver leaves them. `group` -1: none."""
        folder = self.root / "sys/bus/pci/devices" / bdf
        folder.mkdir()
        self.functions.append(bdf)
        vendor, device = ids
        values = {
            "vendor": f"{vendor:#06x}",
            "device": f"{device:#06x}",
            "subsystem_vendor": "0x1af4",
            "subsystem_device": "0x1100",
            "revision": "0x10",
            "class": f"{class_code:#08x}",
            "modalias": f"pci:v{vendor:08X}d{device:08X}sv00001AF4sd00001100bc00scFFi00",
            "numa_node": str(numa),
        }
        if reset:
            values["reset_method"] = reset
        for name, value in values.items():
            write(folder / name, value + "\n")
        if driver:
            link(folder / "driver", f"../../../bus/pci/drivers/{driver}")
        if cdev:
            (folder / "vfio-dev" / cdev).mkdir(parents=True)
        if parent:
            link(folder / "physfn", f"../{parent}")
        if group >= 0:
            link(folder / "iommu_group", f"../../../../kernel/iommu_groups/{group}")
            link(self.root / f"sys/kernel/iommu_groups/{group}/devices/{bdf}", f"../../../../bus/pci/devices/{bdf}")
            write(self.root / f"sys/kernel/iommu_groups/{group}/name", group_name)
        return folder

    def mdev(self, uuid: str, kind: str, *, driver: str, group: int = 7, cdev: str = "") -> None:
        """Add a mediated device of type `kind`; its group is one that stands for no IOMMU."""
        folder = self.root / "sys/bus/mdev/devices" / uuid
        folder.mkdir(parents=True)
        link(folder / "mdev_type", f"../mdev_supported_types/{kind}")
        link(folder / "iommu_group", f"../../../../kernel/iommu_groups/{group}")
        link(self.root / f"sys/kernel/iommu_groups/{group}/devices/{uuid}", f"../../../../bus/mdev/devices/{uuid}")
        write(self.root / f"sys/kernel/iommu_groups/{group}/name", "vfio-noiommu\n")
        if driver:
            link(folder / "driver", f"../../../bus/mdev/drivers/{driver}")
        if cdev:
            (folder / "vfio-dev" / cdev).mkdir(parents=True)

    def rebind(self, bdf: str, driver: str) -> None:
        path = self.root / "sys/bus/pci/devices" / bdf / "driver"
        path.unlink(missing_ok=True)
        if driver:
            link(path, f"../../../bus/pci/drivers/{driver}")

    def nodes(self, *paths: str) -> None:
        """Device nodes, as far as a check sees them."""
        for path in paths:
            write(self.root / path.lstrip("/"))

    def group_nodes(self, group: int = 7) -> None:
        self.nodes("/dev/vfio/vfio", f"/dev/vfio/{group}")

    def cdev_nodes(self, cdev: str = "vfio0") -> None:
        self.nodes("/dev/iommu", f"/dev/vfio/devices/{cdev}")

    def aliases(self, *lines: str) -> None:
        generic = "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n"
        text = "".join(f"alias {line}\n" for line in lines)
        write(self.root / f"lib/modules/{RELEASE}/modules.alias", generic + text)

    def parameter(self, module: str, name: str, value: str) -> None:
        write(self.root / f"sys/module/{module}/parameters/{name}", value + "\n")

    def config(self, *options: str) -> None:
        write(self.root / f"boot/config-{RELEASE}", "\n".join(["# a kernel", *options]) + "\n")


def open_fds() -> set[str]:
    """What this process has open, to see that all is given back."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue  # the listing's own
    return found
