"""The operator's options of this plugin (`--option K=V`), checked.

It must not look at a device.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from plugins.hns.pf import MOST_VFS
from vfu_server.errors import UsageError

NO_PF = "none"
KNOWN = {
    "pf": "its physical function: pf, a BDF, a device's socket, or none; it must have vfio-pci for a driver",
    "vf": f"its number among the PF's VFs, 0 to {MOST_VFS - 1}; needed in mode PF_CTRL",
    "self-test": "yes: read its registers once when it is opened, and log what they say; nothing is written",
}


@dataclass(frozen=True, slots=True)
class Options:
    """`pf` None: not said; NO_PF: not to be looked for. `vf` None: not said."""

    pf: str | None = None
    vf: int | None = None
    self_test: bool = False


def parse_options(options: Mapping[str, str]) -> Options:
    """UsageError for an unknown key, which lists the known ones, and for a value that cannot be."""
    for key in options:
        if key not in KNOWN:
            known = "; ".join(f"{name} ({text})" for name, text in KNOWN.items())
            raise UsageError(f"hns knows no option {key!r}; known are: {known}")
    pf = options.get("pf")
    if pf == "":
        raise UsageError(f"hns: option pf is empty; without a PF it is {NO_PF}")
    test = options.get("self-test", "no")
    if test not in ("yes", "no"):
        raise UsageError(f"hns: self-test is yes or no, not {test!r}")
    return Options(pf, _vf(options.get("vf")), test == "yes")


def _vf(said: str | None) -> int | None:
    if said is None:
        return None
    if not (said.isascii() and said.isdigit()) or int(said) >= MOST_VFS:
        raise UsageError(f"hns: vf is a number from 0 to {MOST_VFS - 1}, not {said!r}")
    return int(said)
