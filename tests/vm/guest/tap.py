"""Owns what programs of Linux's own tests of VFIO say: read as TAP, and judged by what is declared of them here."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.vm.guest.checks import equal

SECONDS = 600
LINE = re.compile(r"(ok|not ok) \d+ (\S+)(?: # SKIP ?(.*))?")
PROGRAM = "program "
DECLARED = {
    r"skip \S+_anonymous_hugetlb_1gb\.\S+ .*": "the machine has no pages of that size",
    r"fail vfio_dma_map_limit_test\.vfio_type1(v2)?_iommu\.overflow": (
        "asks for EOVERFLOW where a range ends behind the last address; type1 of Linux 6.12 answers EINVAL"
    ),
    r"fail vfio_pci_sriov_uapi_test\.iommufd_\w+_uuid\.\w+": (
        "hands over a token with VFIO_DEVICE_BIND_IOMMUFD, which Linux 6.12 answers with EINVAL: it came later"
    ),
    r"skip vfio_pci_irq_test\.(msi|msix)\.\S+ .*not supported": "a function has one of the two",
    r"skip vfio_pci_device_test\.reset .*": "edu has no reset",
}
"""Outcomes that are not a pass, and why."""


def run(program: Path, bdf: str) -> list[str]:
    """What one program says of a function, its name first."""
    done = subprocess.run([program, bdf], capture_output=True, text=True, timeout=SECONDS, check=False)
    return [PROGRAM + program.name, *done.stdout.splitlines(), *done.stderr.splitlines()]


def outcomes(lines: Iterable[str]) -> list[str]:
    """`pass TEST`, `fail TEST` or `skip TEST REASON`, for each test in the output of programs."""
    found = []
    for line in lines:
        match = LINE.fullmatch(line.strip())
        if match:
            kind = "fail" if match[1] != "ok" else "pass" if match[3] is None else "skip"
            found.append(f"{kind} {match[2]} {match[3] or ''}".rstrip())
    return found


def judge(lines: list[str], least: int, what: str) -> None:
    """Fail unless all tests have passed but those that are declared, and there were at least so many that passed."""
    found = outcomes(lines)
    declared = re.compile("|".join(DECLARED))
    wrong = [outcome for outcome in found if not outcome.startswith("pass ") and not declared.fullmatch(outcome)]
    passed = sum(outcome.startswith("pass ") for outcome in found)
    said = "\n".join(lines) if wrong or passed < least else ""
    print(f"report: {what}: {passed} tests passed of {len(found)}", flush=True)
    equal((wrong, passed >= least), ([], True), f"{what}, {passed} tests passed; {said}")
