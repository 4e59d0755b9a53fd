"""Owns the QEMU that migrates vfio-user devices: Debian's source of 11.1.1 with the patches of contrib/qemu, compiled.

One x86-64 system emulator with KVM, TCG and the few devices that tests need. Kept in the cache under version and
patches; firmware comes from the root of tools/qemu_root.py. Knows nothing of what is run in it. Run as a program it
compiles (15 processor minutes) and prints the path.
"""

import bz2
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.debian_root import RootError
from tools.foreign_build import foreign_environment
from tools.qemu_root import QemuRoot, qemu_root
from vfu_server.libvfio_user.upstream import cache, debian

PATCHES = Path(__file__).resolve().parent.parent / "contrib" / "qemu"
KIND = "qemu"
VERSION = "11.1.1"
PROGRAM = "qemu-system-x86_64"
# Raised when the same source and patches are compiled into something else.
FORMAT = 1
PACKAGES = ("meson==1.11.1", "pycotap==1.3.1", "qemu.qmp==0.0.6", "setuptools<81", "wheel", "distlib")
CONFIGURE = (
    *("--target-list=x86_64-softmmu", "--without-default-features", "--without-default-devices"),
    *("--with-devices-x86_64=vfu-server", "--enable-system", "--enable-tcg", "--enable-kvm", "--disable-docs"),
    *("--disable-download", "--disable-install-blobs", "--disable-debug-info"),
)
DEVICES = (
    *("I440FX", "Q35", "VFIO_PCI", "VFIO_USER", "PCIE_PORT", "EDU", "SERIAL_ISA", "ISA_DEBUG", "PVPANIC_ISA"),
    *("VIRTIO_PCI", "VIRTIO_BLK", "VIRTIO_RNG", "VIRTIO_SERIAL"),
)
# What meson asks about, for no target that is built here, and Debian leaves out of its source.
MISSING_BLOBS = (
    *(f"{name}-{part}.fd.bz2" for name in ("edk2-arm", "edk2-riscv", "edk2-loongarch64") for part in ("code", "vars")),
    "edk2-aarch64-code.fd.bz2",
    *(f"edk2-i386-{part}.fd.bz2" for part in ("code", "secure-code", "vars")),
    *(f"edk2-x86_64-{part}.fd.bz2" for part in ("code", "secure-code")),
)
SECONDS = 4 * 3600


def built_qemu() -> QemuRoot:
    """The patched QEMU, compiled on first use. Raises RootError with the reason."""
    return _with_firmware(cache.entry(KIND, _key(), _fill))


def found_qemu() -> QemuRoot | None:
    """The patched QEMU if it has been compiled, else None: tests do not start minutes of work by themselves.

    The environment's VFU_QEMU names another one instead, for who works on the patches.
    """
    if own := os.environ.get("VFU_QEMU"):
        return _with_firmware(Path(own).absolute().parent)
    found = cache.find(KIND, _key())
    return _with_firmware(found) if found else None


def patches() -> list[Path]:
    """The series in its order, without the cover letter."""
    return sorted(path for path in PATCHES.glob("*.patch") if not path.name.startswith("0000-"))


def _with_firmware(folder: Path) -> QemuRoot:
    firmware = qemu_root().argv
    return QemuRoot(folder, (str(folder / PROGRAM), *firmware[firmware.index("-L") :]), {})


def _key() -> str:
    digest = hashlib.sha256(repr((FORMAT, debian.PINNED_SHA256, PACKAGES, CONFIGURE, DEVICES)).encode())
    for path in patches():
        digest.update(path.read_bytes())
    return f"{VERSION}-{digest.hexdigest()[:16]}"


def _fill(folder: Path) -> None:
    _check_programs()
    source, log = folder / "source", folder / "build.log"
    source.mkdir()
    _unpack(folder, source)
    for path in patches():
        _run(["patch", "-p1", "-s", "-f", "-i", str(path)], source, log)
    environment, build = folder / "venv", source / "build"
    _run([sys.executable, "-m", "venv", str(environment)], folder, log)
    python = environment / "bin" / "python"
    _run([str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", *PACKAGES], folder, log)
    build.mkdir(exist_ok=True)
    print("compiling QEMU (minutes, once)", file=sys.stderr, flush=True)
    _run(["../configure", f"--python={python}", *CONFIGURE], build, log)
    _run(["nice", "-n", "10", "ninja", "-j", str(os.cpu_count() or 1), PROGRAM], build, log)
    shutil.copy(build / PROGRAM, folder / PROGRAM)
    _run([str(folder / PROGRAM), "-device", "vfio-user-pci,help"], folder, log)
    if "enable-migration" not in log.read_text(errors="replace"):
        raise RootError("the compiled QEMU has no vfio-user-pci with enable-migration")
    shutil.rmtree(source)
    shutil.rmtree(environment)
    log.unlink()


def _unpack(folder: Path, source: Path) -> None:
    """The whole tarball below `source`, its first folder cut off, and what it lacks for meson."""
    tried: list[str] = []
    offer = debian.pinned_offer(folder, tried)
    if offer is None:
        raise RootError("QEMU's source was not found. Tried:\n" + "".join(f"  - {attempt}\n" for attempt in tried))
    command = ["tar", "-xf", str(offer.tarball), "-C", str(source), "--strip-components=1"]
    _run(command, folder, folder / "build.log")
    offer.tarball.unlink()
    blobs = source / "pc-bios"
    for name in MISSING_BLOBS:
        if not (blobs / name).exists():
            (blobs / name).write_bytes(bz2.compress(b""))
    for tree in (blobs / "dtb").glob("*.dts"):
        tree.with_suffix(".dtb").touch()
    listed = source / "configs" / "devices" / "x86_64-softmmu" / "vfu-server.mak"
    listed.write_text("".join(f"CONFIG_{name}=y\n" for name in DEVICES))


def _check_programs() -> None:
    missing = [name for name in ("gcc", "ninja", "pkg-config", "patch", "tar", "xz") if not shutil.which(name)]
    if not missing:
        asked = subprocess.run(["pkg-config", "--exists", "glib-2.0"], capture_output=True, check=False)
        missing = ["glib-2.0's headers"] if asked.returncode else []
    if missing:
        raise RootError(f"compiling QEMU needs {', '.join(missing)} (to install them: tools/system-packages qemu)")


def _run(command: list[str], folder: Path, log: Path) -> None:
    with open(log, "ab") as output:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=foreign_environment(LC_ALL="C"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RootError(f"compiling QEMU: {command[0]}: {error}") from None
    if done.returncode:
        lines = log.read_text(errors="replace").splitlines()
        shown = [line for line in lines if re.search(r"error|FAILED|malformed", line, re.IGNORECASE)] or lines
        raise RootError(f"compiling QEMU failed at {Path(command[0]).name}: {'; '.join(shown[-5:])}")


if __name__ == "__main__":
    try:
        print(built_qemu().argv[0])
    except RootError as problem:
        raise SystemExit(f"error: {problem}") from None
