"""Owns the kind of machine that has another one inside: QEMU, and for each program of tests/vm/inner what boots it."""

import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vm.kinds import image
from tests.vm.lane import Kind, Plugged
from tools.qemu_root import qemu_root
from tools.vm.devices import edu, igb, nvme
from tools.vm.initramfs import Cpio
from tools.vm.kernel import kernel
from tools.vm.machine import Share

PROGRAMS = Path(__file__).with_name("inner")
IMAGE = 2 << 20
MEMORY = 1280


def inner_files(folder: Path) -> Path:
    """The inner machine's kernel, and for each program an initial memory file system with the program alone."""
    folder.mkdir()
    for source in PROGRAMS.glob("*_init.c"):
        name = source.name.removesuffix("_init.c")
        program = folder / name
        subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(program), str(source)], check=True)
        cpio = Cpio()
        cpio.add("dev", stat.S_IFDIR | 0o755)
        cpio.add("init", stat.S_IFREG | 0o755, program.read_bytes())
        (folder / f"{name}.initrd").write_bytes(cpio.finish())
    shutil.copy(kernel("custom").image, folder / "bzImage")
    return folder


@contextmanager
def plugged(home: Path) -> Iterator[Plugged]:
    """One function of each sort that the inner machine is given."""
    shares = [Share(qemu_root().path, "/qemu"), Share(inner_files(home / "inner"), "/inner")]
    yield Plugged([edu(), nvme(image(home, IMAGE)), igb()], shares, MEMORY)


INNER = Kind("inner", "custom", plugged)
