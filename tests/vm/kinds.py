"""Owns the kinds of machines that tests boot: with Debian's kernel, whose VFIO has groups, and ours, which has iommufd.

What is in them decides which scripts can share one: a script finds its function by vendor and device id.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.model_process import ModelProcess
from tests.vm.guest.functions import option_rom
from tests.vm.lane import Kind, Plugged
from tools.vm.devices import Device, edu, igb, nvme, vfio_user

IMAGE = 1 << 20
SEED = random.randrange(1 << 32)
"""Of the ROM's contents."""
# e1000 is alone behind a bridge, so that the bus can be reset.
BRIDGED = Device(
    ("-device", "pci-bridge,id=bridge{slot},chassis_nr=2,addr={slot}", "-device", "e1000,bus=bridge{slot},addr=1")
)


def image(home: Path, size: int = IMAGE) -> Path:
    """An empty disk."""
    path = home / "nvme.img"
    path.write_bytes(bytes(size))
    return path


@contextmanager
def functions(home: Path) -> Iterator[Plugged]:
    """One function of each sort."""
    yield Plugged([edu(), nvme(image(home)), igb(), BRIDGED])


@contextmanager
def functions_with_rom(home: Path) -> Iterator[Plugged]:
    """The same, edu with an option ROM; for what leaves functions as nobody else should find them."""
    rom = home / "rom"
    rom.write_bytes(option_rom(SEED))
    yield Plugged([Device(("-device", f"edu,addr={{slot}},romfile={rom}")), nvme(image(home)), igb()])


@contextmanager
def pair(_home: Path) -> Iterator[Plugged]:
    """Two edus: a source and a destination, or a device and its peer."""
    yield Plugged([edu(), edu()])


@contextmanager
def model(home: Path) -> Iterator[Plugged]:
    """Our model of edu, which runs outside, as a PCI device."""
    with ModelProcess(home, "edu", time_scale=1.0) as served:
        yield Plugged([vfio_user(served.path)])


GROUP, CDEV = Kind("group", "stock", functions), Kind("cdev", "custom", functions)
VISITED_GROUP, VISITED_CDEV = (
    Kind("visited-group", "stock", functions_with_rom),
    Kind("visited-cdev", "custom", functions_with_rom),
)
PAIR_GROUP, PAIR_CDEV = Kind("pair-group", "stock", pair), Kind("pair-cdev", "custom", pair)
MODEL = Kind("model", "custom", model)
