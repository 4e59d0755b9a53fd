"""Owns the machine's functions made ready for VFIO: those that are there, and virtual ones, made first."""

import random
import struct
import subprocess
from functools import cache

from tests.vm.guest import pci

ROM_SIZE = 2048
ADDRESS = bytes.fromhex("020000c0ffee")
"""The hardware address of the first virtual function."""


def option_rom(seed: int) -> bytes:
    """A ROM for edu that the kernel takes for one (PCI Firmware Specification 3.0, 5.1), the rest at random."""
    rom = bytearray(random.Random(seed).randbytes(ROM_SIZE))
    blocks = ROM_SIZE // 512
    struct.pack_into("<HB", rom, 0, 0xAA55, blocks)
    struct.pack_into("<H", rom, 0x18, 0x1C)
    struct.pack_into("<4sHHHHB3sHHBB", rom, 0x1C, b"PCIR", *pci.EDU, 0, 0x18, 0, bytes(3), blocks, 0, 0, 0x80)
    return bytes(rom)


def ready(ids: tuple[int, int]) -> str:
    """The one function with these ids, bound to vfio-pci."""
    bdf = pci.only(ids)
    if pci.driver(bdf) != "vfio-pci":
        pci.bind(bdf)
    return bdf


def interface(bdf: str) -> str:
    """The name of the one network interface of a function."""
    (found,) = (pci.DEVICES / bdf / "net").iterdir()
    return found.name


@cache
def virtual_functions() -> list[str]:
    """igb's two virtual functions, bound to vfio-pci; the card itself stays with its driver, which answers them."""
    card = pci.only(pci.IGB)
    subprocess.run(["modprobe", "-q", "igb"], stderr=subprocess.DEVNULL, check=False)
    if pci.driver(card) != "igb":
        pci.bind(card, "igb")
    # Only a card that is up listens to its functions' mailboxes and sends messages.
    subprocess.run(["ip", "link", "set", interface(card), "up"], check=True)
    count = pci.DEVICES / card / "sriov_numvfs"
    if count.read_text().strip() == "0":
        # Else a driver for them would take them first.
        (pci.DEVICES / card / "sriov_drivers_autoprobe").write_text("0")
        count.write_text("2")
    address = ADDRESS.hex(":")
    subprocess.run(["ip", "link", "set", interface(card), "vf", "0", "mac", address], check=True)
    found = pci.find(pci.IGB_VF)
    for bdf in found:
        pci.bind(bdf)
    return found
