"""Checks in the test machine that Linux's own tests of VFIO agree with a function that we present, in a guest with an
IOMMU: `inner_selftests.py`.

Once the server presents a virtual function of igb to vfio-user-pci, once QEMU has it by vfio-pci: the outcomes have to
be the same. The program inside is tests/vm/inner/selftests_init.c.
"""

from pathlib import Path

from tests.vm.guest import checks, functions, tap
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS, Used, by_our_server, by_the_kernel

checks.SECONDS = CHECK_SECONDS
PLACE = {"bus": "downstream"}
LEAST = 50

used: dict[str, Used] = {}


def check_by_our_server() -> None:
    used["ours"] = by_our_server(
        functions.virtual_functions()[0], "selftests", PLACE, "--mmap", "all", plugin="vfio", iommu=True
    )


def check_by_the_kernel() -> None:
    used["the kernel's"] = by_the_kernel(functions.virtual_functions()[0], "selftests", PLACE, iommu=True)


def check_outcomes_are_equal_and_declared() -> None:
    for who, found in used.items():
        for number, inside in enumerate(found.inside):
            Path(f"/results/selftests-{who}-{number}").write_text("\n".join(inside.said))
            tap.judge(inside.said, LEAST, f"selftests/vfio inside, {who}")
    ours, theirs = ([tap.outcomes(inside.said) for inside in used[who].inside] for who in ("ours", "the kernel's"))
    equal(ours, theirs, "by both")


checks.run(globals())
