"""Checks in the test machine that a machine inside it uses nvme by its kernel's own driver: `inner_nvme.py`.

Once the server presents it to vfio-user-pci (plugin vfio), once QEMU has it from the kernel by vfio-pci. The program
inside is tests/vm/inner/nvme_init.c.
"""

import re

from tests.vm.guest import checks, functions, inner_machine, pci
from tests.vm.guest.checks import equal

checks.SECONDS = inner_machine.CHECK_SECONDS

results: dict[str, list[list[str]]] = {}


def check_nvme_by_our_server() -> None:
    results["ours"] = inner_machine.by_our_server(functions.ready(pci.NVME), "vfio", "--mmap", "all")


def check_nvme_by_the_kernel() -> None:
    results["the kernel's"] = inner_machine.by_the_kernel(functions.ready(pci.NVME))


def check_what_was_written_is_found() -> None:
    # The disk is empty at first; after the reset, and for who comes second, the pattern is there from before.
    kinds = [re.sub(r"sum \w+", "sum", line) for found in results.get("ours", []) for line in found]
    place = "result: {}: 2097152 bytes, sum, {}"
    after = [place.format("written", "the pattern"), place.format("bound again", "the pattern")]
    before = [place.format("found", kind) for kind in ("something else", "the pattern")]
    equal(kinds, [before[0], *after, before[1], *after], "by the server, before and after the reset")


def check_results_are_equal() -> None:
    ours, theirs = results.get("ours", []), results.get("the kernel's", [])
    equal(len(ours), 2, "runs")
    equal(theirs, [ours[1], ours[1]], "what the kernel's function has, and who wrote it, by sums of all bytes")


checks.run(globals())
