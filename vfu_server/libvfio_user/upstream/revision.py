"""Owns which revision of libvfio-user is compiled: names it, and refuses any other by name.

The extension reaches into private headers of the library (its transport table, its DMA regions, its interrupt fds), so
a source that merely looks alike is not good enough. The revision is known by the digests of every C file and header
that we compile or include, listed in `<revision>.sha256` beside this file. Knows nothing of where a source comes from.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

REVISION = "4d9f663"
MIGRATION_VERSION = 2
ACCEPT = "VFU_ACCEPT_LIBVFIO_USER"
C_FILES = ("btree", "dma", "fd_cache", "irq", "libvfio-user", "migration", "pci", "pci_caps", "tran")


class SourceError(Exception):
    """No usable source of libvfio-user; the message is meant for the person who runs the build."""


class Source(NamedTuple):
    """A checked source folder, the digest of what we use of it, and its name for people."""

    path: Path
    digest: str
    name: str


def wanted() -> dict[str, str]:
    """File -> sha256 of the revision that this version of the server is written against."""
    lines = (Path(__file__).parent / f"{REVISION}.sha256").read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def digest_of(files: dict[str, str]) -> str:
    """One digest over a listing, independent of where the files lie."""
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


def check(folder: Path) -> Source:
    """The source in `folder` if it is the wanted revision, or one that the user accepts knowingly.

    Raises SourceError: not libvfio-user, the migration protocol before v2 (never acceptable), or another revision.
    """
    header = folder / "include" / "libvfio-user.h"
    if not header.is_file():
        raise SourceError(f"{folder} is not libvfio-user's source: it has no include/libvfio-user.h")
    version = _migration_version(header)
    if version != MIGRATION_VERSION:
        raise SourceError(
            f"{folder} holds a revision of libvfio-user with VFU_MIGR_CALLBACKS_VERS {version or 'undefined'}, "
            f"wanted is {MIGRATION_VERSION} (revision {REVISION}): sources of QEMU before 11.1 carry the old one"
        )
    expected, found = wanted(), listing(folder)
    digest = digest_of(found)
    if digest == digest_of(expected):
        return Source(folder, digest, REVISION)
    if os.environ.get(ACCEPT) == digest:
        return Source(folder, digest, f"{digest[:12]}, accepted by {ACCEPT}")
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    shown = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
    raise SourceError(
        f"{folder} holds another revision of libvfio-user ({digest[:12]}), wanted is {REVISION} "
        f"({digest_of(expected)[:12]}); it differs in {shown}. The transport uses private headers of the library: "
        f"to build against this one knowingly, set {ACCEPT}={digest} and run all the tests"
    )


def listing(folder: Path) -> dict[str, str]:
    """Digests of the listed files as far as they exist, and of every header, listed or not."""
    headers = (
        path.relative_to(folder).as_posix() for part in ("include", "lib") for path in folder.glob(f"{part}/**/*.h")
    )
    names = {*headers, *(name for name in wanted() if (folder / name).is_file())}
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def _migration_version(header: Path) -> int | None:
    found = re.search(r"^#define\s+VFU_MIGR_CALLBACKS_VERS\s+(\d+)", header.read_text(errors="replace"), re.MULTILINE)
    return int(found[1]) if found else None
