"""Owns compiling the custom kernel: Debian's kernel source, `make tinyconfig` and the fragment vfio-kernel.config.

Knows nothing of who boots it. Compiles at the lowest priority, outside the tree, and keeps the image, the configuration
and the release only.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from tools.debian_root import RootError
from tools.foreign_build import foreign_environment

FRAGMENT = Path(__file__).with_name("vfio-kernel.config")
PROGRAMS = ("make", "gcc", "flex", "bison", "bc", "xz")
HEADERS = ("libelf.h", "openssl/opensslv.h")
# The same image from the same input, without the name of the machine that compiled it.
REPRODUCIBLE = {
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    "KBUILD_BUILD_USER": "vfu-server",
    "KBUILD_BUILD_HOST": "tests",
    "LC_ALL": "C",
}
SECONDS = 3600


def compile_kernel(tarball: Path, folder: Path) -> None:
    """Leave `bzImage`, `config` and `release` in `folder`; 14 processor minutes, 2 GB of scratch space meanwhile."""
    _check_tools()
    source = folder / "source"
    source.mkdir()
    log = folder / "build.log"
    _run(["tar", "-xf", str(tarball), "-C", str(source), "--strip-components=1"], folder, log)
    make = ["nice", "-n", "19", "make", "-C", str(source), f"-j{os.cpu_count() or 1}"]
    _run([*make, "tinyconfig"], folder, log)
    # The last line about an option counts; what it needs besides is filled in by olddefconfig.
    config = source / ".config"
    config.write_text(f"{config.read_text()}\n{FRAGMENT.read_text(encoding='utf-8')}")
    _run([*make, "olddefconfig"], folder, log)
    if refused := options(FRAGMENT.read_text(encoding="utf-8")) - options(config.read_text()):
        raise RootError(f"{FRAGMENT.name}: this kernel does not take {', '.join(sorted(refused))}")
    _run([*make, "bzImage"], folder, log)
    shutil.copy(source / "arch/x86/boot/bzImage", folder / "bzImage")
    shutil.copy(config, folder / "config")
    (folder / "release").write_text((source / "include/config/kernel.release").read_text().strip())
    shutil.rmtree(source)
    log.unlink()


def options(text: str) -> set[str]:
    """What a configuration sets, one `CONFIG_NAME=value` each."""
    return set(re.findall(r"^CONFIG_\w+=.+$", text, re.MULTILINE))


def _check_tools() -> None:
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if not missing:
        asked = "".join(f"#include <{header}>\n" for header in HEADERS)
        done = subprocess.run(["gcc", "-E", "-xc", "-"], input=asked, capture_output=True, text=True, check=False)
        missing = [header for header in HEADERS if f"{header}: No such file" in done.stderr]
    if missing:
        raise RootError(f"compiling the kernel needs {', '.join(missing)} (to install them: tools/system-packages vm)")


def _run(command: list[str], folder: Path, log: Path) -> None:
    with open(log, "ab") as output:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=foreign_environment(**REPRODUCIBLE),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RootError(f"compiling the kernel took longer than {SECONDS} s") from None
    if done.returncode:
        lines = log.read_text(errors="replace").splitlines()
        shown = [line for line in lines if re.search(r"error|\*\*\*|cannot", line, re.IGNORECASE)] or lines
        raise RootError(f"compiling the kernel failed: {'; '.join(shown[-5:])}")
