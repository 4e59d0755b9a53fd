"""Owns the environment in which somebody else's source is compiled: ours, without what is meant for ourselves.

A make that finds another one's level and flags takes itself for a part of that: Linux's tests then have no folder for
what they make, and put it below `/`. Knows nothing of what is compiled.
"""

import os

OURS = frozenset({"MAKEFLAGS", "MAKELEVEL", "MAKEFILES", "MFLAGS", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"})


def foreign_environment(**more: str) -> dict[str, str]:
    """The environment of a compiler or a make that is not ours, with `more`."""
    return {name: value for name, value in os.environ.items() if name not in OURS} | more
