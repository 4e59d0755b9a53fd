"""Owns the cache outside the tree: entries that are there whole or not at all, also after an interruption.

Knows nothing of what is kept in it. An entry's name carries the version and the content it was made from, so an entry
never changes: another input is another entry.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DONE = ".complete"
PARTIAL = ".partial"


def cache_root() -> Path:
    """`$VFU_CACHE`, else `vfu-server` in the user's cache folder (XDG base directories)."""
    if chosen := os.environ.get("VFU_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return home / "vfu-server"


def find(kind: str, key: str) -> Path | None:
    """The finished entry, or None; never waits and never makes one."""
    entry = cache_root() / kind / key
    return entry if (entry / DONE).is_file() else None


def entry(kind: str, key: str, fill: Callable[[Path], None], *, in_place: bool = False) -> Path:
    """The folder `kind/key`, made by `fill(folder)` unless it is there already.

    One process fills while others wait for it. What `fill` makes is on disk before the entry appears under its name;
    what interrupted runs left behind is removed, whatever they were making of that kind. `in_place` is for content that
    knows its own path (a virtual environment): it is filled under its final name and counts once its mark is written.
    Raises what `fill` raises.
    """
    home = cache_root() / kind
    _sweep(home)
    if found := find(kind, key):
        return found
    home.mkdir(parents=True, exist_ok=True)
    target = home / key
    with locked(home / f".{key}.lock", f"{kind} {key}"):
        if found := find(kind, key):
            return found
        work = target if in_place else home / f".{key}{PARTIAL}"
        for leftover in (target, work):
            _remove(leftover)
        work.mkdir()
        try:
            fill(work)
            os.sync()
            _write_mark(work)
            if work != target:
                work.rename(target)
            _sync_folder(home)
        except BaseException:
            _remove(work)
            raise
    return target


def discard(path: Path) -> None:
    """Remove a finished entry whose content turned out damaged, so that the next call makes it anew."""
    with locked(path.parent / f".{path.name}.lock", path.name):
        (path / DONE).unlink(missing_ok=True)
        _remove(path)


@contextmanager
def locked(lock: Path, what: str) -> Iterator[None]:
    """Hold `lock` against other processes; says so when it has to wait. The kernel frees it when its holder dies."""
    with open(lock, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that is making {what}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(home: Path) -> None:
    """Remove what nobody is filling any more: an entry of yesterday's patches is not asked for again."""
    for work in home.glob(f".*{PARTIAL}"):
        with open(work.with_name(work.name.removesuffix(PARTIAL) + ".lock"), "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove(work)


def _write_mark(folder: Path) -> None:
    with open(folder / DONE, "w", encoding="utf-8") as mark:
        mark.flush()
        os.fsync(mark.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
