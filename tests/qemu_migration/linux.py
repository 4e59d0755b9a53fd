"""Owns what a Linux guest for migration boots: the kernel of the test machine, one program as its system.

Must not know where the guest runs or moves to.
"""

import stat
import subprocess
from pathlib import Path

from tests.lanes import lane_unavailable
from tools.debian_root import RootError
from tools.vm.initramfs import Cpio
from tools.vm.kernel import is_made, kernel

PROGRAM = Path(__file__).resolve().parents[1] / "vm" / "inner" / "busy_init.c"


def boot_files(folder: Path) -> list[str]:
    """QEMU's arguments for kernel and initial memory file system, made in `folder`."""
    if not is_made("custom"):
        lane_unavailable("the custom kernel has not been compiled (tools/vm/kernel.py)")
    try:
        image = kernel("custom").image
    except RootError as error:
        lane_unavailable(str(error))
    program = folder / "init"
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(program), str(PROGRAM)], check=True)
    cpio = Cpio()
    cpio.add("dev", stat.S_IFDIR | 0o755)
    cpio.add("init", stat.S_IFREG | 0o755, program.read_bytes())
    (folder / "initrd").write_bytes(cpio.finish())
    return [
        *("-kernel", str(image), "-initrd", str(folder / "initrd")),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
    ]
