"""Owns what can be plugged into the test machine, as QEMU's arguments.

Slots are device numbers of bus 0 from FIRST_SLOT on; a program in the machine finds its device by vendor and device id.
"""

import json
from dataclasses import dataclass
from pathlib import Path

FIRST_SLOT = 0x10


@dataclass(frozen=True, slots=True)
class Device:
    """One device; `{slot}` in an argument stands for the device number that it gets."""

    argv: tuple[str, ...]

    def at(self, slot: int) -> list[str]:
        """QEMU's arguments for the device at `slot`."""
        return [argument.replace("{slot}", hex(slot)) for argument in self.argv]


def edu() -> Device:
    """QEMU's teaching device: one BAR, MSI and INTx, a DMA channel, no reset (1234:11e8)."""
    return Device(("-device", "edu,addr={slot}"))


def nvme(image: Path) -> Device:
    """A controller with one namespace in `image`: queues, FLR, MSI-X (1b36:0010)."""
    escaped = str(image).replace(",", ",,")
    drive = f"if=none,id=image{{slot}},format=raw,file={escaped}"
    return Device(("-drive", drive, "-device", "nvme,drive=image{slot},serial=vm{slot},addr={slot}"))


def igb() -> Device:
    """A network function with virtual functions behind a root port of its own (8086:10c9, VFs 8086:10ca)."""
    port = "pcie-root-port,id=port{slot},chassis={slot},addr={slot}"
    return Device(("-device", port, "-nic", "none", "-device", "igb,bus=port{slot}"))


def e1000e() -> Device:
    """An 82574L (8086:10d3) on a wire with a virtio interface, at which the machine itself is the other end."""
    near, far = ("hubport,id=near{slot},hubid={slot}", "hubport,id=far{slot},hubid={slot}")
    function = "e1000e,netdev=near{slot},addr={slot},romfile="
    return Device(
        ("-netdev", near, "-netdev", far, "-device", function, "-device", "virtio-net-pci,netdev=far{slot},romfile=")
    )


def vfio_user(socket: Path) -> Device:
    """What a vfio-user server at `socket` presents. It has to listen before the machine starts."""
    described = {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": str(socket)},
        "addr": "{slot}",
    }
    return Device(("-device", json.dumps(described)))
