"""Owns Linux's own tests of VFIO (tools/testing/selftests/vfio): fetched with Debian's kernel source and compiled once.

They are static programs that take a PCI address and say in TAP what they found. Nothing of theirs is changed. Knows
nothing of machines. Run as a program it prints where they are.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.debian_root import RootError, RootSpec, debian_root
from tools.foreign_build import foreign_environment
from vfu_server.libvfio_user.upstream import cache

# The oldest series with these tests is 6.18. A backport goes when a newer one comes, so the newest has to do then.
PACKAGES = ("linux-source-7.2", "linux-source")
FOLDER = "tools/testing/selftests/vfio"
# What of the source compiling them takes: the user's headers are made from the kernel's.
PARTS = (
    *("Makefile", "Kbuild", "include", "scripts", "arch/x86", "tools/include", "tools/arch/x86"),
    *("tools/testing/selftests/*.h", "tools/testing/selftests/*.mk", FOLDER),
    *("drivers/dma/idxd/*.h", "drivers/dma/ioat/*.h"),
)
WILDCARDS = ("--wildcards", "--no-wildcards-match-slash")
HEADER = "uuid/uuid.h"
FORMAT = 1


def selftests() -> Path:
    """The folder with the programs, made on first use (a minute). Raises RootError with the reason."""
    key = f"vfio-{hashlib.sha256(repr((FORMAT, PACKAGES, PARTS)).encode()).hexdigest()[:16]}"
    return cache.entry("selftests", key, _fill) / "bin"


def _fill(folder: Path) -> None:
    asked = subprocess.run(
        ["gcc", "-E", "-xc", "-"], input=f"#include <{HEADER}>\n", capture_output=True, text=True, check=False
    )
    if asked.returncode or not shutil.which("make"):
        raise RootError("Linux's selftests need make and uuid-dev (to install them: tools/system-packages vm)")
    print("compiling Linux's own tests of VFIO (a minute, once)", file=sys.stderr, flush=True)
    source = folder / "source"
    source.mkdir()
    unpack = ["tar", "-xf", str(_tarball()), "-C", str(source), "--strip-components=1", *WILDCARDS]
    _run([*unpack, *(f"linux-source-*/{part}" for part in PARTS)])
    make = ["make", "-s", f"-j{os.cpu_count() or 1}"]
    _run([*make, "-C", str(source), "headers"])
    tests = source / FOLDER
    headers = f"KHDR_INCLUDES=-isystem {source}/usr/include"
    _run(
        [*make, "-C", str(tests), f"top_srcdir={source}", headers, "LDFLAGS=-static", f"EXTRA_CFLAGS={_missing(tests)}"]
    )
    (folder / "bin").mkdir()
    for program in tests.glob("vfio_*_test"):
        shutil.copy(program, folder / "bin")
    if not any((folder / "bin").iterdir()):
        raise RootError("Linux's selftests made no program")
    shutil.rmtree(source)


def _missing(tests: Path) -> str:
    """A stable series took changes that call a function of a newer one's headers, and does not compile without it."""
    headers = "".join(path.read_text() for path in tests.rglob("*.h"))
    return "" if "calloc_assert" in headers else "-Dcalloc_assert=calloc"


def _tarball() -> Path:
    reasons = []
    for package in PACKAGES:
        spec = RootSpec(name="selftests-source", suite="trixie", packages=(), pinned=(package,))
        try:
            root = debian_root(spec, lambda _root: None)
        except RootError as error:
            reasons.append(str(error))
            continue
        found = sorted((root / "usr/src").glob("linux-source-*.tar.xz"))
        if found:
            return found[-1]
        reasons.append(f"{package} has no source")
    raise RootError("; ".join(reasons))


def _run(command: list[str]) -> None:
    done = subprocess.run(
        ["nice", "-n", "19", *command],
        capture_output=True,
        text=True,
        env=foreign_environment(),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise RootError(f"making Linux's selftests failed: {'; '.join(done.stderr.splitlines()[-5:])}")


if __name__ == "__main__":
    try:
        print(selftests())
    except RootError as problem:
        raise SystemExit(f"error: {problem}") from None
