"""Owns the kernels that a test machine boots: Debian's stock one as it is, and a custom one with iommufd built in.

Both are made once and kept in the cache. Knows nothing of QEMU and of what runs in the machine. Run as a program it
makes all of them and prints their releases.
"""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.debian_root import RootError, RootSpec, debian_root
from tools.vm import kernel_build
from tools.vm.root import foreign, guest_root, need_x86_64
from vfu_server.libvfio_user.upstream import cache

KernelName = Literal["stock", "custom"]
KERNELS: tuple[KernelName, ...] = ("stock", "custom")

SUITE = "trixie"
SERIES = "6.12"
STOCK = RootSpec(name="kernel", suite=SUITE, packages=("linux-image-amd64",))
SOURCE = RootSpec(name="kernel-source", suite=SUITE, packages=(f"linux-source-{SERIES}",))
# Raised when the same source and fragment are compiled into something else.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Kernel:
    """One bootable kernel.

    `modules` is the folder named by the release, with the dependency list in it, or None when all is built in. `early`
    names the modules without which the machine cannot reach its file systems. `iommufd` tells whether it has /dev/iommu
    and VFIO's character devices; it has VFIO's groups in any case.
    """

    name: KernelName
    release: str
    image: Path
    modules: Path | None
    early: tuple[str, ...]
    iommufd: bool


def kernel(name: KernelName) -> Kernel:
    """The kernel, made on first use. Raises RootError with the reason."""
    need_x86_64()
    return stock() if name == "stock" else custom()


def stock() -> Kernel:
    """Debian's generic kernel: VFIO by group, type1; everything is a module, 9p too. 30 s on first use."""
    modules = _stock_modules(debian_root(STOCK, _index_modules))
    image = modules.parents[3] / "boot" / f"vmlinuz-{modules.name}"
    return Kernel(
        "stock", modules.name, image, modules, ("virtio_blk", "squashfs", "9pnet_virtio", "9p"), iommufd=False
    )


def custom() -> Kernel:
    """The one of vfio-kernel.config: groups, iommufd and character devices, mtty. Compiled on first use: minutes."""
    folder = cache.entry("kernel", _custom_key(), _fill_custom)
    return Kernel("custom", (folder / "release").read_text(), folder / "bzImage", None, (), iommufd=True)


def is_made(name: KernelName) -> bool:
    """False when `kernel(name)` would have to download or compile it first."""
    if name == "stock":
        return cache.find("debian-root", STOCK.key) is not None
    return cache.find("kernel", _custom_key()) is not None


def _stock_modules(root: Path) -> Path:
    found = list((root / "usr/lib/modules").glob(f"{SERIES}.*"))
    if len(found) != 1 or not (root / "boot" / f"vmlinuz-{found[0].name}").is_file():
        raise RootError(f"Debian's kernel package is not the one {SERIES} kernel that was expected")
    return found[0]


def _index_modules(root: Path) -> None:
    """What the package's own scripts would have done: the list of what depends on what."""
    modules = _stock_modules(root)
    command = [*foreign(guest_root(), "usr/bin/kmod", name="depmod"), "-b", str(root / "usr"), modules.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (modules / "modules.dep").stat().st_size:
        raise RootError(f"depmod failed: {done.stderr.strip()}")


def _custom_key() -> str:
    made_from = (FORMAT, SOURCE, kernel_build.FRAGMENT.read_text(encoding="utf-8"))
    made_of = repr(made_from).replace(", architecture=''", "")  # as it was before a root had a choice of it
    return f"custom-{SERIES}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def _fill_custom(folder: Path) -> None:
    tarball = Path("usr/src") / f"linux-source-{SERIES}.tar.xz"

    def verify(root: Path) -> None:
        if not (root / tarball).is_file():
            raise RootError(f"Debian's kernel source package has no {tarball}")

    root = debian_root(SOURCE, verify)
    print("compiling the custom kernel (minutes, once)", file=sys.stderr, flush=True)
    kernel_build.compile_kernel(root / tarball, folder)


if __name__ == "__main__":
    try:
        for made in KERNELS:
            print(made, kernel(made).release)
    except RootError as problem:
        raise SystemExit(f"error: {problem}") from None
