"""Owns the kinds of machines that tests boot: with Debian's kernel, whose VFIO has groups, and ours, which has iommufd.

What is in them decides which scripts can share one: a script finds its function by vendor and device id.
"""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tests.model_process import ModelProcess
from tests.vm.guest.functions import option_rom
from tests.vm.lane import Kind, Plugged
from tools.vm.devices import Device, e1000e, edu, igb, nvme, vfio_user

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
def wired_pair(_home: Path) -> Iterator[Plugged]:
    """Two 82574L, each on a wire to the machine itself."""
    yield Plugged([e1000e(), e1000e()])


@contextmanager
def model(home: Path) -> Iterator[Plugged]:
    """Our model of edu, which runs outside, as a PCI device."""
    with ModelProcess(home, "edu", time_scale=1.0) as served:
        yield Plugged([vfio_user(served.path)])


@contextmanager
def two_of(home: Path, module: str, *arguments: str) -> Iterator[Plugged]:
    """Two of a vendor's devices, models that run outside: PF and VF of each as PCI devices, one after the other."""
    devices: list[Device] = []
    with ExitStack() as stack:
        for name in ("a", "b"):
            (home / name).mkdir()
            served = ModelProcess(home / name, *arguments, module=module, time_scale=1.0)
            path = stack.enter_context(served).path
            devices += [vfio_user(path), vfio_user(path.with_name(f"{path.name}.pf"))]
        yield Plugged(devices)


def hns(home: Path) -> AbstractContextManager[Plugged]:
    """Two ZIP accelerators."""
    return two_of(home, "plugins.hns.models", "zip")


def mlx5(home: Path) -> AbstractContextManager[Plugged]:
    """Two ConnectX cards with a small state and few pages of their driver's: each page is a message."""
    pages = ("--boot-pages", "4", "--init-pages", "8", "--vf-pages", "4", "--save-pages", "2")
    return two_of(home, "plugins.mlx5.models", "connectx", "--image-size", "64K", *pages)


GROUP, CDEV = Kind("group", "stock", functions), Kind("cdev", "custom", functions)
VISITED_GROUP, VISITED_CDEV = (
    Kind("visited-group", "stock", functions_with_rom),
    Kind("visited-cdev", "custom", functions_with_rom),
)
PAIR_GROUP, PAIR_CDEV = Kind("pair-group", "stock", pair), Kind("pair-cdev", "custom", pair)
E1000E_GROUP, E1000E_CDEV = Kind("e1000e-group", "stock", wired_pair), Kind("e1000e-cdev", "custom", wired_pair)
MODEL = Kind("model", "custom", model)
HNS_GROUP, HNS_CDEV = Kind("hns-group", "stock", hns), Kind("hns-cdev", "custom", hns)
MLX5_GROUP, MLX5_CDEV = Kind("mlx5-group", "stock", mlx5), Kind("mlx5-cdev", "custom", mlx5)
