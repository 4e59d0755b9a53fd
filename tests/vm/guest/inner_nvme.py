"""Checks in the test machine that a machine inside it uses nvme by its kernel's own driver: `inner_nvme.py`.

Once the server presents it to vfio-user-pci (plugin vfio), once QEMU has it from the kernel by vfio-pci. The program
inside is tests/vm/inner/nvme_init.c.
"""

import re

from tests.vm.guest import checks, functions, inner_lspci, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS, Used, by_our_server, by_the_kernel

checks.SECONDS = CHECK_SECONDS
PLACE = {"bus": "pcie.0", "addr": "0x10"}

used: dict[str, Used] = {}


def check_nvme_by_our_server() -> None:
    used["ours"] = by_our_server(functions.ready(pci.NVME), "nvme", PLACE, "--mmap", "all", plugin="vfio")


def check_nvme_by_the_kernel() -> None:
    used["the kernel's"] = by_the_kernel(functions.ready(pci.NVME), "nvme", PLACE)


def check_what_was_written_is_found() -> None:
    # The disk is empty at first; after the reset, and for who comes second, the pattern is there from before.
    kinds = [re.sub(r"sum \w+", "sum", line) for found in used["ours"].results for line in found]
    place = "result: {}: 2097152 bytes, sum, {}"
    after = [place.format("written", "the pattern"), place.format("bound again", "the pattern")]
    before = [place.format("found", kind) for kind in ("something else", "the pattern")]
    equal(kinds, [before[0], *after, before[1], *after], "by the server, before and after the reset")


def check_results_are_equal() -> None:
    ours, theirs = used["ours"].results, used["the kernel's"].results
    equal(theirs, [ours[1], ours[1]], "what the kernel's function has, and who wrote it, by sums of all bytes")


def check_lspci_inside_agrees() -> None:
    inner_lspci.compare("nvme", used["ours"], used["the kernel's"])


checks.run(globals())
