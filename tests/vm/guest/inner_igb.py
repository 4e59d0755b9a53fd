"""Checks in the test machine that a machine inside it uses a virtual function of igb: `inner_igb.py`.

Its kernel's own igbvf sends frames to the card, whose interface a thread here answers at. Once the server presents the
function to vfio-user-pci (plugin vfio), once QEMU has it from the kernel by vfio-pci. The program inside is
tests/vm/inner/igb_init.c.
"""

from tests.vm.guest import checks, functions, inner_lspci, packets, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS, Used, by_our_server, by_the_kernel

checks.SECONDS = CHECK_SECONDS
PLACE = {"bus": "downstream"}
FRAMES = 64
DIFFERENCES = {
    r"00: (ff ff ff ff|86 80 ca 10) ": "a virtual function's ids read as ffff; the kernel's VFIO puts them in",
    r"Capabilities: \[150 v1\] Alternative Routing|ARICap:|ARICtl:|100: ": "QEMU hides ARI, the last in AER's list",
    r"LnkCtl2:|Transmit Margin:|Compliance Preset": "lspci leaves them out where it knows of a virtual function",
}
"""Of a virtual function between outside and inside, besides those of any function."""

used: dict[str, Used] = {}


def check_igb_by_our_server() -> None:
    bdf = functions.virtual_functions()[0]
    with packets.answered(functions.interface(pci.only(pci.IGB))) as answers:
        used["ours"] = by_our_server(bdf, "igb", PLACE, "--mmap", "all", plugin="vfio")
    equal(answers.count >= 4 * (FRAMES + 1), True, f"frames that were answered: {answers.count}")


def check_igb_by_the_kernel() -> None:
    bdf = functions.virtual_functions()[0]
    with packets.answered(functions.interface(pci.only(pci.IGB))) as answers:
        used["the kernel's"] = by_the_kernel(bdf, "igb", PLACE)
    equal(answers.count >= 4 * (FRAMES + 1), True, f"frames that were answered: {answers.count}")


def check_results_are_equal_and_right() -> None:
    found = used["ours"].results
    equal(found, used["the kernel's"].results, "by both")
    sums = {line.partition("sum ")[2] for results in found for line in results if "sum " in line}
    equal(len(sums), 1, f"sums of what came back: {sums}")
    wanted = []
    for when in ("bound", "bound again"):
        wanted.append(f"result: {when}, address {functions.ADDRESS.hex(':')}")
        wanted.append(f"result: {FRAMES} frames of 60 to 1509 bytes there and back, sum {sums.pop() if sums else ''}")
        sums.add(wanted[1].rpartition(" ")[2])
    equal(found, [wanted, wanted], "by the server, before and after the reset")


def check_lspci_inside_agrees() -> None:
    inner_lspci.compare("igb", used["ours"], used["the kernel's"], DIFFERENCES)


checks.run(globals())
