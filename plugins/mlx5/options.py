"""The operator's `--option K=V` for this plugin, parsed and checked.

It opens nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vfu_server.errors import UsageError

KNOWN: Final = {
    "pf": "the physical function, to be driven from here: a BDF, a device socket's path, or a word for a model's",
    "vf": "which of its virtual functions this is, from 0, where that cannot be found out",
    "self-test": "1: look into the physical function and say what was found, changing nothing but what serving does",
}
MAX_VF: Final = 0xFFFE


@dataclass(frozen=True, slots=True)
class Options:
    """`pf` is empty and `vf` None where nothing was said."""

    pf: str = ""
    vf: int | None = None
    self_test: bool = False


def parse(options: Mapping[str, str]) -> Options:
    """UsageError for anything unknown or wrong."""
    for key in options:
        if key not in KNOWN:
            known = "; ".join(f"{name} ({meaning})" for name, meaning in KNOWN.items())
            raise UsageError(f"mlx5 knows no option {key!r}; known are: {known}")
    if "pf" in options and not options["pf"].strip():
        raise UsageError(f"mlx5: option pf is empty; it is {KNOWN['pf']}")
    return Options(options.get("pf", "").strip(), _number(options.get("vf")), _switch(options.get("self-test", "0")))


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_VF:
        raise UsageError(f"mlx5: option vf is a number from 0 to {MAX_VF}, not {text!r}")
    return number


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise UsageError(f"mlx5: option self-test is 0 or 1, not {text!r}")
    return text == "1"
