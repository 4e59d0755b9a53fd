"""What must hold before a function can be opened, one small check each, with the command that cures what it finds.

`open_bdf` refuses on the first that fails; the doctor prints them all. Nothing is opened or changed here.
"""

import enum
import errno
import os
import pwd
import resource
from collections.abc import Iterator
from dataclasses import dataclass

from vfu_server.errors import HostError
from vfu_server.host.binding import best_driver, bind_commands, lasting_command
from vfu_server.host.ioctl import Kernel
from vfu_server.host.sysfs import Function, Sysfs

CAP_IPC_LOCK = 14
DEFAULT_MAPS = 65535
"""The kernel's default for vfio_iommu_type1.dma_entry_limit, and what vfio-user clients may assume."""


class Status(enum.StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's result. `cure`: what an operator types or sets, a line each. `errno`: of the refusal, if it fails."""

    name: str
    status: Status
    text: str
    cure: tuple[str, ...] = ()
    errno: int = 0

    def error(self) -> HostError:
        """The finding as the refusal to open."""
        refusal = HostError(self.text, self.errno or errno.ENODEV)
        for line in self.cure:
            refusal.add_note(line)
        return refusal


class Way(enum.StrEnum):
    """By which of the kernel's interfaces a function is opened."""

    CDEV = "cdev"
    GROUP = "group"


def nodes_of(way: Way, function: Function) -> tuple[str, str]:
    """The two device nodes that must be opened: the IOMMU's, and the function's own or its group's."""
    if way is Way.CDEV:
        return "/dev/iommu", f"/dev/vfio/devices/{function.vfio_device}"
    return "/dev/vfio/vfio", f"/dev/vfio/{function.group}"


def ways(kernel: Kernel, function: Function) -> list[Way]:
    """The interfaces whose nodes are there, best first."""
    known = [Way.CDEV] if function.vfio_device else []
    if function.group >= 0:
        known.append(Way.GROUP)
    return [way for way in known if all(kernel.path(node).exists() for node in nodes_of(way, function))]


def usable_way(kernel: Kernel, function: Function) -> Way | None:
    """The best interface whose nodes this process may open."""
    for way in ways(kernel, function):
        if all(kernel.may_use(kernel.path(node)) for node in nodes_of(way, function)):
            return way
    return None


# --- checks that decide about opening


def check_mdev(function: Function) -> Finding:
    """A mediated device's driver has it: that stands before it as an IOMMU, and its group has no other member."""
    name = "driver"
    if not function.on_vfio:
        text = f"the mediated device {function.bdf} ({function.mdev_type}) has no driver: its parent's does not run"
        return Finding(name, Status.FAIL, text, errno=errno.ENODEV)
    return Finding(name, Status.OK, f"{function.bdf} ({function.mdev_type}) has the driver {function.driver}")


def check_driver(sysfs: Sysfs, function: Function) -> Finding:
    """A VFIO driver has the function."""
    name = "driver"
    if function.is_bridge:
        text = f"{function.bdf} is a PCI bridge (class {function.class_code:06x}): no VFIO driver takes bridges"
        return Finding(name, Status.FAIL, text, errno=errno.EINVAL)
    best = best_driver(sysfs, function)
    if not function.on_vfio:
        has = f"the driver {function.driver}" if function.driver else "no driver"
        text = f"{function.bdf} has {has}; it has to be bound to {best}. As root, once:"
        cure = (lasting_command(function, best), "or, until the next boot:", *bind_commands(function, best))
        return Finding(name, Status.FAIL, text, cure, errno.ENODEV)
    if best.replace("_", "-") not in ("vfio-pci", function.driver.replace("_", "-")):
        text = f"{function.bdf} is bound to {function.driver}; the kernel has {best} for it, which can migrate it"
        return Finding(name, Status.WARN, text, (lasting_command(function, best),))
    return Finding(name, Status.OK, f"{function.bdf} is bound to {function.driver}")


def check_iommu(sysfs: Sysfs, function: Function) -> Finding:
    """An IOMMU stands before the function."""
    name = "iommu"
    if function.group >= 0 and sysfs.group_name(function.group) != "vfio-noiommu":
        found = ", ".join(sysfs.iommus()) or "an IOMMU"
        return Finding(name, Status.OK, f"IOMMU group {function.group}, behind {found}")
    if function.group >= 0:
        text = (
            f"{function.bdf} is in VFIO's no-IOMMU mode: its DMA would reach all memory of this machine, "
            "so it is not served"
        )
    elif iommus := sysfs.iommus():
        text = f"{function.bdf} is behind none of this machine's IOMMUs ({', '.join(iommus)})"
        return Finding(name, Status.FAIL, text, errno=errno.ENODEV)
    else:
        text = f"there is no IOMMU before {function.bdf}: it is off, or this machine has none"
    return Finding(name, Status.FAIL, text, _switch_iommu_on(sysfs), errno.ENODEV)


def _switch_iommu_on(sysfs: Sysfs) -> tuple[str, ...]:
    line = sysfs.command_line().split()
    off = [word for word in line if word in ("intel_iommu=off", "amd_iommu=off", "iommu=off")]
    steps = ["switch it on in the firmware's set-up (VT-d, AMD-Vi or SMMU)"]
    if off:
        steps.append(f"take {' '.join(off)} from the kernel's command line")
    elif sysfs.processor_vendor() == "GenuineIntel" and "intel_iommu=on" not in line:
        steps.append("put intel_iommu=on on the kernel's command line")
    return (*steps, "then boot again")


def check_group(sysfs: Sysfs, function: Function) -> Finding:
    """Nobody else's driver has a member of the IOMMU group."""
    name = "group"
    if function.group < 0:
        return Finding(name, Status.FAIL, f"{function.bdf} is in no IOMMU group", errno=errno.ENODEV)
    members = sysfs.members(function.group)
    blocking = [member for member in members if member.blocks_group]
    others = [member.bdf for member in members if member.bdf != function.bdf]
    if not blocking:
        with_it = f", shared with {', '.join(others)}" if others else ", alone"
        return Finding(name, Status.OK, f"IOMMU group {function.group} is viable{with_it}")
    named = ", ".join(f"{member.bdf} ({member.driver})" for member in blocking)
    text = (
        f"IOMMU group {function.group} is not viable: {named} must leave its driver, too, since the IOMMU cannot "
        f"tell it from {function.bdf}. As root:"
    )
    cure = [line for member in blocking for line in (*bind_commands(member, "vfio-pci"),)]
    return Finding(name, Status.FAIL, text, tuple(dict.fromkeys(cure)), errno.EPERM)


def check_token(sysfs: Sysfs, function: Function, token: str) -> Finding:
    """The token that the kernel wants where PF and VF are both in user space."""
    name = "vf-token"
    if not function.physical_function:
        return Finding(name, Status.OK, "no token needed: this is no VF")
    parent = sysfs.function(function.physical_function)
    if not parent.on_vfio:
        if token:
            text = f"a vf token was given, but the PF {parent.bdf} has the driver {parent.driver or 'none'}"
            return Finding(name, Status.FAIL, text, ("leave the token out",), errno.EINVAL)
        return Finding(name, Status.OK, f"no token needed: the PF {parent.bdf} is the kernel's")
    if not token:
        text = f"the PF {parent.bdf} is in user space, too: its VFs open only with the PF's vf token"
        return Finding(name, Status.FAIL, text, ("give the token that the PF's user has set",), errno.EACCES)
    return Finding(name, Status.OK, f"a token is given, as the PF {parent.bdf} is in user space")


def check_permission(kernel: Kernel, function: Function) -> Finding:
    """The device nodes are there and this process may open them."""
    name = "permission"
    if way := usable_way(kernel, function):
        return Finding(name, Status.OK, f"{' and '.join(nodes_of(way, function))} can be opened ({way.value})")
    found = ways(kernel, function)
    if not found:
        if not function.on_vfio or function.group < 0:
            text = "there is no device node to open: the function is not bound to a VFIO driver"
            return Finding(name, Status.FAIL, text, errno=errno.ENOENT)
        missing = [node for node in nodes_of(Way.GROUP, function) if not kernel.path(node).exists()]
        text = f"missing: {' and '.join(missing)}; a container has to be given the nodes"
        return Finding(name, Status.FAIL, text, ("modprobe vfio-pci",), errno.ENOENT)
    denied = [node for node in nodes_of(found[0], function) if not kernel.may_use(kernel.path(node))]
    user = _user_name()
    text = f"{user} may not open {' and '.join(denied)}. As root:"
    rule = f'\'SUBSYSTEM=="vfio", OWNER="{user}"\''
    cure = (f"setfacl -m u:{user}:rw {' '.join(denied)}", f"or, to last: echo {rule} > /etc/udev/rules.d/70-vfio.rules")
    return Finding(name, Status.FAIL, text, cure, errno.EACCES)


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def before_opening(kernel: Kernel, sysfs: Sysfs, function: Function, token: str) -> Iterator[Finding]:
    """The checks that decide, in the order in which an operator cures them."""
    if function.mdev_type:
        yield check_mdev(function)
        yield check_permission(kernel, function)
        return
    yield check_driver(sysfs, function)
    yield check_iommu(sysfs, function)
    yield check_group(sysfs, function)
    yield check_token(sysfs, function, token)
    yield check_permission(kernel, function)


# --- checks that warn


def check_memlock(limit: int, *, privileged: bool) -> Finding:
    """Guest memory is locked while it is mapped. RLIMIT_MEMLOCK (`limit`, in bytes) bounds it for all but the
    `privileged`.
    """
    name = "memlock"
    if privileged or limit == resource.RLIM_INFINITY:
        return Finding(name, Status.OK, "guest memory of any size can be locked")
    text = f"at most {limit >> 20} MiB of guest memory can be locked for the device (RLIMIT_MEMLOCK)"
    cure = (
        "LimitMEMLOCK=infinity in the [Service] of the unit",
        f"or: prlimit --memlock=unlimited --pid {os.getpid()}",
    )
    return Finding(name, Status.WARN, text, cure)


def memlock_of_process(sysfs: Sysfs) -> tuple[int, bool]:
    """This process's limit in bytes, and whether it is above it (CAP_IPC_LOCK)."""
    effective = 0
    for line in _lines(sysfs, "/proc/self/status"):
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], bool(effective >> CAP_IPC_LOCK & 1)


def _lines(sysfs: Sysfs, path: str) -> list[str]:
    try:
        return sysfs.path(path).read_text().splitlines()
    except OSError:
        return []


def check_map_limit(sysfs: Sysfs, way: Way | None) -> Finding:
    """How many maps the IOMMU interface keeps; a guest with a vIOMMU makes one for each page."""
    name = "map-limit"
    if way is Way.CDEV:
        return Finding(name, Status.OK, "iommufd counts no maps")
    limit = sysfs.module_parameter("vfio_iommu_type1", "dma_entry_limit")
    if limit.isdecimal() and int(limit) < DEFAULT_MAPS:
        text = f"a type1 container keeps {limit} maps here, clients may make {DEFAULT_MAPS}"
        cure = (f"echo {DEFAULT_MAPS} > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit",)
        return Finding(name, Status.WARN, text, cure)
    return Finding(name, Status.OK, f"a type1 container keeps {limit or DEFAULT_MAPS} maps")


def check_interrupts(sysfs: Sysfs) -> Finding:
    """The IOMMU checks interrupt messages as well."""
    name = "interrupts"
    modules = [
        m for m in ("vfio_iommu_type1", "iommufd") if sysfs.module_parameter(m, "allow_unsafe_interrupts") == "Y"
    ]
    if not modules:
        return Finding(name, Status.OK, "the kernel insists on isolated interrupt messages")
    text = "allow_unsafe_interrupts is set: a guest can send any interrupt to this machine"
    cure = tuple(f"echo N > /sys/module/{module}/parameters/allow_unsafe_interrupts" for module in modules)
    return Finding(name, Status.WARN, text, cure)


def check_kernel(sysfs: Sysfs, way: Way | None) -> Finding:
    """What the kernel was built with, where it makes a difference."""
    name = "kernel"
    release = sysfs.kernel_release()
    if way is None:
        return Finding(name, Status.OK, f"Linux {release}")
    if way is Way.CDEV:
        return Finding(name, Status.OK, f"Linux {release}, with iommufd and VFIO device nodes")
    options = sysfs.kernel_options()
    missing = [
        option for option in ("CONFIG_IOMMUFD", "CONFIG_VFIO_DEVICE_CDEV") if options.get(option) not in ("y", "m")
    ]
    why = f" (it was built without {' and '.join(missing)})" if options and missing else ""
    text = f"Linux {release} opens the function by its group{why}: the IOMMU cannot tell dirty pages then"
    return Finding(name, Status.WARN, text, ("a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",))
