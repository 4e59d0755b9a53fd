"""Owns the initial memory file system of the test machine: busybox, init.sh, early modules, and this run's job.

It is the machine's root for good, so it has the links that make Debian's /usr a whole system. The archive is cpio's
`newc` form, which the kernel unpacks: a header of hexadecimal fields and a name, then data, each padded to 4 bytes.
"""

import lzma
import stat
from pathlib import Path

from tools.debian_root import RootError
from tools.vm.kernel import Kernel

INIT = Path(__file__).with_name("init.sh")
BUSYBOX = "usr/bin/busybox"
FOLDERS = ("dev", "etc", "modules", "proc", "results", "root", "run", "sys", "tmp", "usr", "var")
LINKS = {name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")} | {"var/run": "/run"}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/hostname": "vm\n",
}


class Cpio:
    """An archive that is being written, in memory."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        """One entry; `mode` is file type and permissions, `data` a file's content or a link's target."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        self._put(b"070701" + b"".join(b"%08x" % field for field in fields) + encoded)
        self._put(data)

    def finish(self) -> bytes:
        """The archive's bytes, closed by the trailer."""
        self.add("TRAILER!!!", 0)
        return bytes(self._out)

    def _put(self, data: bytes) -> None:
        self._out += data
        self._out += bytes(-len(self._out) % 4)


def initramfs(root: Path, kernel: Kernel, shares: str, job: str) -> bytes:
    """The archive. `shares` has a line `tag folder options` for each share, `job` is a shell script."""
    cpio = Cpio()
    for folder in FOLDERS:
        cpio.add(folder, stat.S_IFDIR | 0o755)
    for name, target in LINKS.items():
        cpio.add(name, stat.S_IFLNK | 0o777, target.encode())
    for name, text in {**FILES, "shares": shares, "job": job}.items():
        cpio.add(name, stat.S_IFREG | 0o644, text.encode())
    cpio.add("init", stat.S_IFREG | 0o755, INIT.read_bytes())
    cpio.add("busybox", stat.S_IFREG | 0o755, (root / BUSYBOX).read_bytes())
    for number, module in enumerate(early_modules(kernel)):
        # Debian compresses modules; without modprobe they have to be loaded as they are, in this order.
        cpio.add(f"modules/{number:02}-{module.name.removesuffix('.xz')}", stat.S_IFREG | 0o644, plain_module(module))
    return cpio.finish()


def early_modules(kernel: Kernel) -> list[Path]:
    """The kernel's early modules with all that they depend on, each after what it needs."""
    if kernel.modules is None:
        return []
    wanted: dict[str, None] = {}
    needs = _dependencies((kernel.modules / "modules.dep").read_text())
    for name in kernel.early:
        if name not in needs:
            raise RootError(f"the kernel {kernel.release} has no module {name}")
        # depmod lists a module's needs so that the last one is to be loaded first.
        wanted |= dict.fromkeys([*reversed(needs[name][1:]), needs[name][0]])
    return [kernel.modules / path for path in wanted]


def _dependencies(text: str) -> dict[str, list[str]]:
    """modules.dep: module name -> its own path, then the paths of all modules that it needs."""
    lines = (line.replace(":", "", 1).split() for line in text.splitlines())
    return {Path(paths[0]).name.split(".")[0].replace("-", "_"): paths for paths in lines if paths}


def plain_module(path: Path) -> bytes:
    """A module as the kernel takes it, whatever it is compressed with."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
