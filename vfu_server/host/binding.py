"""The commands that give a function to a VFIO driver: which driver suits it, and what an operator types.

It reads and recommends; it never binds anything itself.
"""

from fnmatch import fnmatchcase

from vfu_server.host.sysfs import Function, Sysfs

VFIO_PCI = "vfio-pci"


def best_driver(sysfs: Sysfs, function: Function) -> str:
    """The VFIO driver that the kernel's module aliases name for this device, vfio-pci if no variant is there.

    Variant drivers are found as `vfio_pci:` aliases with a device id; a module is called as its driver is.
    """
    wanted = function.modalias.replace("pci:", "vfio_pci:", 1)
    for line in sysfs.module_aliases():
        words = line.split()
        if len(words) == 3 and words[1].startswith("vfio_pci:v0") and fnmatchcase(wanted, words[1]):
            return words[2]
    return VFIO_PCI


def bind_commands(function: Function, driver: str) -> tuple[str, ...]:
    """What root types, in order, so that `driver` has the function."""
    node = f"/sys/bus/pci/devices/{function.bdf}"
    commands = [f"modprobe {driver}", f"echo {driver} > {node}/driver_override"]
    if function.driver:
        commands.append(f"echo {function.bdf} > {node}/driver/unbind")
    commands.append(f"echo {function.bdf} > /sys/bus/pci/drivers_probe")
    return tuple(commands)


def lasting_command(function: Function, driver: str) -> str:
    """The same in one, kept over a reboot, where driverctl is installed."""
    return f"driverctl set-override {function.bdf} {driver}"
