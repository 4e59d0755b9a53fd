"""Checks in the test machine that Linux's own tests of VFIO agree with the functions that we use: `selftests.py`.

/selftests has the programs. Every test of every program has to pass on every function but for what tap.py declares,
with the reason. One of the functions is a model of ours, plugged in from outside.
"""

from pathlib import Path

from tests.vm.guest import checks, functions, pci, tap

checks.SECONDS = 900
PROGRAMS = Path("/selftests")
IOAT = (0x8086, 0x2F20)
# The driver test needs a device that it has a driver for, and 1 GiB mapped; the other one needs a whole card.
NOT_FOR_ALL = ("vfio_pci_driver_test", "vfio_pci_sriov_uapi_test")
ENABLE_SRIOV = Path("/sys/module/vfio_pci/parameters/enable_sriov")
LEAST, LEAST_OF_A_CARD = 50, 10


def usual(bdf: str) -> None:
    """All programs that any function will do for."""
    Path("/proc/sys/vm/nr_hugepages").write_text("4")
    programs = [path for path in sorted(PROGRAMS.glob("vfio_*_test")) if path.name not in NOT_FOR_ALL]
    lines = [line for program in programs for line in tap.run(program, bdf)]
    Path(f"/results/selftests-{bdf}").write_text("\n".join(lines))
    tap.judge(lines, LEAST, f"{len(programs)} programs of selftests/vfio, {bdf}")


def check_edu() -> None:
    usual(functions.ready(pci.EDU))


def check_nvme() -> None:
    usual(functions.ready(pci.NVME))


def check_model_from_outside() -> None:
    usual(functions.ready(IOAT))


def check_virtual_function() -> None:
    usual(functions.virtual_functions()[0])


def check_card_with_virtual_functions() -> None:
    card = pci.only(pci.IGB)
    if pci.driver(card):
        (pci.DEVICES / card / "sriov_numvfs").write_text("0")
    ENABLE_SRIOV.write_text("1")
    (pci.DEVICES / card / "sriov_drivers_autoprobe").write_text("1")
    pci.bind(card)
    lines = tap.run(PROGRAMS / "vfio_pci_sriov_uapi_test", card)
    ENABLE_SRIOV.write_text("0")
    tap.judge(lines, LEAST_OF_A_CARD, f"a card and its virtual function, {card}")


checks.run(globals())
