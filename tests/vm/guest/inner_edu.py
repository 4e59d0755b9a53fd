"""Checks in the test machine that a machine inside it uses edu: `inner_edu.py`.

Once the server presents it to vfio-user-pci, once QEMU has it from the kernel by vfio-pci; results have to be equal.
The program inside is tests/vm/inner/edu_init.c.
"""

from tests.vm.guest import checks, functions, inner_machine, pci
from tests.vm.guest.checks import equal

checks.SECONDS = inner_machine.CHECK_SECONDS

results: dict[str, list[list[str]]] = {}


def check_edu_by_our_server() -> None:
    results["ours"] = inner_machine.by_our_server(functions.ready(pci.EDU), "generic_dmaq")


def check_edu_by_the_kernel() -> None:
    results["the kernel's"] = inner_machine.by_the_kernel(functions.ready(pci.EDU))


def check_results_are_equal_and_right() -> None:
    wanted = []
    for when in ("bound", "bound again"):
        wanted += [
            f"result: {when}, identification 0x10000ed",
            "result: 10! by MSI = 3628800",
            "result: DMA there and back equal",
            "result: 7! by INTx = 5040",
        ]
    equal(results.get("ours"), [wanted, wanted], "by the server, before and after the reset")
    equal(results.get("ours"), results.get("the kernel's"), "by both")


checks.run(globals())
