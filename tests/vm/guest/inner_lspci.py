"""Owns comparing what lspci tells of a function inside the inner machine with what it tells outside.

Inside it has to be the same, to the byte, by our server and by vfio-pci. What may differ between inside and outside is
declared here; nothing else may.
"""

import difflib
import re
import tempfile
from pathlib import Path

from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import Found, Used, lspci

DIFFERENCES = {
    r"[0-9a-f]{2}:[0-9a-f]{2}\.[0-7] ": "the first line: where it is plugged in",
    r"Interrupt: pin . routed to IRQ \d+": "which line a pin leads to is the machine's",
    r"Region \d: (Memory|I/O ports) at ": "BARs are placed by each machine; sizes are not in a dump",
    r"10: |20: ": "the same bytes: BARs",
    r"30: ": "the interrupt line; the ROM's address",
    r"IOMMU group: |Kernel driver in use: |Kernel modules: |Physical Slot: |NUMA node: ": "not in a dump",
}
"""Beginnings of lines that may differ, and why."""


def inside(found: Found) -> str:
    """What lspci tells of the function inside."""
    with tempfile.NamedTemporaryFile("w") as dump:
        dump.write(found.config)
        dump.flush()
        return lspci("-F", dump.name)


def compare(name: str, ours: Used, theirs: Used, more: dict[str, str] | None = None) -> None:
    """Compare the function of a program as it was after its first boot; `more` are differences of this function."""
    told = {"inside-ours": inside(ours.inside[0]), "inside-theirs": inside(theirs.inside[0]), "outside": ours.outside}
    for what, text in told.items():
        Path(f"/results/{name}-lspci-{what}").write_text(text)
    equal(told["inside-ours"].splitlines(), told["inside-theirs"].splitlines(), f"{name}, inside, by both")
    allowed = re.compile("|".join(f"(?:{pattern})" for pattern in DIFFERENCES | (more or {})))
    changed = difflib.ndiff(*(_lines(told[what]) for what in ("outside", "inside-ours")))
    undeclared = [line for line in changed if line[0] in "+-" and not allowed.match(line[2:])]
    equal(undeclared, [], f"{name}: lines that differ between outside (-) and inside (+)")
    equal(len(_lines(told["outside"])) > 10, True, "lspci tells something")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
