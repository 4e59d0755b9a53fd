"""Checks in the test machine that a machine inside it uses edu: `inner_edu.py`.

Once the server presents it to vfio-user-pci, once QEMU has it from the kernel by vfio-pci; results have to be equal.
The program inside is tests/vm/inner/edu_init.c.
"""

from tests.vm.guest import checks, functions, inner_lspci, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS, Used, by_our_server, by_the_kernel

checks.SECONDS = CHECK_SECONDS
PLACE = {"bus": "pcie.0", "addr": "0x10"}

used: dict[str, Used] = {}


def check_edu_by_our_server() -> None:
    used["ours"] = by_our_server(functions.ready(pci.EDU), "edu", PLACE, plugin="generic_dmaq")


def check_edu_by_the_kernel() -> None:
    used["the kernel's"] = by_the_kernel(functions.ready(pci.EDU), "edu", PLACE)


def check_results_are_equal_and_right() -> None:
    wanted = []
    for when in ("bound", "bound again"):
        wanted += [
            f"result: {when}, identification 0x10000ed",
            "result: 10! by MSI = 3628800",
            "result: DMA there and back equal",
            "result: 7! by INTx = 5040",
        ]
    equal(used["ours"].results, [wanted, wanted], "by the server, before and after the reset")
    equal(used["ours"].results, used["the kernel's"].results, "by both")


def check_lspci_inside_agrees() -> None:
    inner_lspci.compare("edu", used["ours"], used["the kernel's"])


checks.run(globals())
