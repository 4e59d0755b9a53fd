"""Owns the order in which libvfio-user's source is looked for, and the error that lists everything that was tried.

    1. LIBVFIO_USER_SRC, a folder named by the user: that one or an error, nothing else is tried
    2. the cache outside the tree
    3. Debian's source package of QEMU, from the mirror that this machine's apt is configured with

Run as a program it prints the folder.
"""

import os
import sys
from pathlib import Path

from vfu_server.libvfio_user.upstream import cache, debian, revision
from vfu_server.libvfio_user.upstream.revision import Source, SourceError

VARIABLE = "LIBVFIO_USER_SRC"
KIND = "libvfio-user"


def locate() -> Source:
    """A checked source; downloads it once if need be. Raises SourceError with all that was tried."""
    if named := os.environ.get(VARIABLE):
        try:
            return revision.check(Path(named).expanduser().absolute())
        except SourceError as error:
            raise SourceError(f"{VARIABLE}: {error}") from None
    key = f"{revision.REVISION}-{revision.digest_of(revision.wanted())[:16]}"
    tried = [f"{VARIABLE} is not set"]
    if found := cache.find(KIND, key):
        try:
            return revision.check(found)
        except SourceError as error:
            tried.append(f"the cache was damaged and has been dropped: {error}")
            cache.discard(found)
    else:
        tried.append(f"not in the cache: {cache.cache_root() / KIND / key}")
    return revision.check(cache.entry(KIND, key, lambda folder: _fetch(folder, tried)))


def _fetch(folder: Path, tried: list[str]) -> None:
    """Fill `folder` from the first offer of Debian that holds the wanted revision."""
    for offer in debian.offers(folder, tried):
        try:
            debian.unpack(offer, folder)
            revision.check(folder)
            return
        except (SourceError, OSError) as error:
            tried.append(f"{offer.name}: {error}")
            debian.clear(folder)
    raise SourceError(
        "libvfio-user's source was not found. Tried:\n"
        + "".join(f"  - {attempt}\n" for attempt in tried)
        + f"Set {VARIABLE} to a folder with revision {revision.REVISION} of it (QEMU 11.1 carries it in "
        "subprojects/libvfio-user of its source package)."
    )


def main() -> int:
    """Print the folder of the checked source."""
    try:
        print(locate().path)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
