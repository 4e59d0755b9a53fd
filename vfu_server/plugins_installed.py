"""Which plugins are installed: entry points of the group `vfu_server`, found without importing any of them.

The directories of `sys.path` are read as importlib.metadata reads them, at a fraction of its cost (its import alone
is a tenth of our start-up); importlib.metadata itself is asked when that does not find a name, since it also knows
other importers than directories.
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import Distribution

GROUP = "vfu_server"
_SUFFIXES = (".dist-info", ".egg-info")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry point: `target` is `module` or `module:attribute`."""

    name: str
    target: str
    distribution: str
    version: str


def find(name: str) -> list[Entry]:
    """All entries called `name` (more than one is the operator's trouble)."""
    found = [entry for entry in _in_directories() if entry.name == name]
    return found or [entry for entry in _in_metadata() if entry.name == name]


def find_all() -> list[Entry]:
    """Every installed plugin, by name."""
    return sorted({*_in_directories(), *_in_metadata()}, key=lambda entry: (entry.name, entry.distribution))


def _in_directories() -> Iterator[Entry]:
    seen: set[str] = set()
    for folder in dict.fromkeys(path or "." for path in sys.path):
        try:
            with os.scandir(folder) as listing:
                names = sorted(item.name for item in listing if item.name.endswith(_SUFFIXES))
        except OSError:
            continue
        for item in names:
            metadata = f"{folder}/{item}"
            distribution = _normalized(item.rpartition(".")[0].partition("-")[0])
            if distribution in seen:
                continue
            text = _read(f"{metadata}/entry_points.txt")
            if GROUP not in text:
                continue
            seen.add(distribution)
            version = _version(metadata)
            yield from (Entry(name, target, distribution, version) for name, target in _group(text))


def _group(text: str) -> Iterator[tuple[str, str]]:
    """The `name = target` lines of our section."""
    section = ""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section == f"[{GROUP}]" and "=" in line and not line.startswith(("#", ";")):
            name, _, target = line.partition("=")
            yield name.strip(), target.partition("[")[0].strip()


def _version(metadata: str) -> str:
    for file in ("METADATA", "PKG-INFO"):
        match = re.search(r"^Version:\s*(\S+)", _read(f"{metadata}/{file}"), re.MULTILINE)
        if match:
            return match[1]
    return "unknown"


def _in_metadata() -> Iterator[Entry]:
    import importlib.metadata

    for point in importlib.metadata.entry_points(group=GROUP):
        name, version = _identity(point.dist)
        yield Entry(point.name, point.value.partition("[")[0].strip(), name, version)


def _identity(distribution: "Distribution | None") -> tuple[str, str]:
    """Name and version, also of one whose metadata is broken: then importlib gives None, whatever its types say."""
    found: tuple[object, object] = (None, None) if distribution is None else (distribution.name, distribution.version)
    name, version = found
    return _normalized(name) if isinstance(name, str) else "", version if isinstance(version, str) else "unknown"


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "_", distribution).lower()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
