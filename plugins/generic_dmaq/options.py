"""The operator's options of this plugin (`--option K=V`), checked.

It must not look at a device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from plugins.generic_dmaq.profile import LONGEST_DRAIN
from vfu_server.errors import UsageError

KNOWN = {
    "profile": "a shipped profile's name or the path of a profile file; without it the device's ids choose",
    "drain-timeout": f"seconds that a stop waits for the queues to run empty, up to {LONGEST_DRAIN}",
}


@dataclass(frozen=True, slots=True)
class Options:
    """`profile` empty: found by ids. `drain_seconds` None: what the profile says."""

    profile: str = ""
    drain_seconds: float | None = None


def parse_options(options: Mapping[str, str]) -> Options:
    """UsageError for an unknown key, which lists the known ones, and for a value that cannot be."""
    for key in options:
        if key not in KNOWN:
            known = "; ".join(f"{name} ({text})" for name, text in KNOWN.items())
            raise UsageError(f"generic_dmaq knows no option {key!r}; known are: {known}")
    profile = options.get("profile", "")
    if "profile" in options and not profile:
        raise UsageError("generic_dmaq: option profile is empty")
    said = options.get("drain-timeout")
    if said is None:
        return Options(profile)
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_DRAIN:
        raise UsageError(f"generic_dmaq: drain-timeout must be seconds above 0 and up to {LONGEST_DRAIN}, not {said!r}")
    return Options(profile, seconds)
