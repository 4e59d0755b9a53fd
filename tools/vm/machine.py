"""Owns the command line of the test machine: a q35 under emulation with an IOMMU, shares, and devices at known slots.

Hardware virtualisation is not used, so the machine is the same wherever tests run. Knows nothing of what runs in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.qemu_root import QemuRoot
from tools.vm.devices import FIRST_SLOT, Device
from tools.vm.kernel import Kernel

PROCESSORS = 2
# Emulated code pays for the mitigations of real processors; a panic has to end the run.
COMMAND_LINE = "console=ttyS0 panic=-1 mitigations=off intel_iommu=on random.trust_cpu=on no_timer_check"
# Read-only shares never change during a run, so the guest may keep what it has read; results have to arrive at once.
KEPT = "ro,cache=loose,msize=512000"
LIVE = "rw,cache=none,msize=131072"


@dataclass(frozen=True, slots=True)
class Share:
    """A folder of this system as the machine sees it."""

    folder: Path
    seen_at: str
    writable: bool = False


def shares_table(shares: Sequence[Share]) -> str:
    """What the machine's init reads: tag, folder and mount options, a line for each share."""
    return "".join(
        f"{_tag(number)} {share.seen_at} {LIVE if share.writable else KEPT}\n" for number, share in enumerate(shares)
    )


def command_line(
    qemu: QemuRoot,
    kernel: Kernel,
    initrd: Path,
    *,
    console: Path,
    usr: Path,
    shares: Sequence[Share],
    devices: Sequence[Device],
    memory: int,
    kernel_options: str = "",
) -> list[str]:
    """QEMU's arguments; `usr` is the image of /usr, `memory` is MiB, `kernel_options` are added to the usual ones.

    The memory is a shared memfd, which vfio-user servers outside the machine need.
    """
    argv = [
        *qemu.argv,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-run-with", "exit-with-parent=on"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(PROCESSORS)),
        *("-object", f"memory-backend-memfd,id=memory,size={memory}M,share=on"),
        *("-machine", "q35,memory-backend=memory", "-m", f"{memory}M"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd), "-append", f"{COMMAND_LINE} {kernel_options}"),
        *("-chardev", f"file,id=console,path={_escaped(console)}", "-serial", "chardev:console"),
        # Before the devices, else they are not behind it.
        *("-device", "intel-iommu,intremap=on,caching-mode=on"),
    ]
    argv += ["-drive", f"if=none,id=usr,format=raw,readonly=on,file={_escaped(usr)}"]
    argv += ["-device", "virtio-blk-pci,drive=usr"]
    for number, share in enumerate(shares):
        mode = "" if share.writable else ",readonly=on"
        argv += ["-fsdev", f"local,id={_tag(number)},path={_escaped(share.folder)},security_model=none{mode}"]
        argv += ["-device", f"virtio-9p-pci,fsdev={_tag(number)},mount_tag={_tag(number)}"]
    for slot, device in enumerate(devices, FIRST_SLOT):
        argv += device.at(slot)
    return argv


def _tag(number: int) -> str:
    return f"share{number}"


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")
