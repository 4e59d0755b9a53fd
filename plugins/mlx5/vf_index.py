"""Which of its physical function's virtual functions a device is, from the addresses of the two.

Arithmetic on config space only. PCI Express Base Specification, SR-IOV extended capability (0x10).
"""

import re
from typing import Final

from vfu_server.errors import HostError
from vfu_server.host_device import HostDevice
from vfu_server.uapi import RegionIndex

SRIOV: Final = 0x10
FIRST_EXTENDED: Final = 0x100
_FIRST_OFFSET, _STRIDE, _NUM_VFS = 0x14, 0x16, 0x10
_BDF: Final = re.compile(r"^([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])$", re.IGNORECASE)


def index_of(physical: HostDevice, virtual: HostDevice, said: int | None) -> int:
    """The index from 0. `said` is the operator's, and must agree where it can be found out. A function behind a socket
    has no address: there it is `said`, or 0. HostError.
    """
    pf, vf = _routing(physical.name), _routing(virtual.name)
    if pf is None or vf is None:
        return said or 0
    found = _from_capability(physical, pf, vf)
    if found is None and said is None:
        raise HostError(f"{virtual.name} is no virtual function of {physical.name}, as far as its config space says")
    if found is not None and said is not None and found != said:
        raise HostError(f"{virtual.name} is virtual function {found} of {physical.name}, not {said} (--option vf)")
    return (said or 0) if found is None else found


def is_address(name: str) -> bool:
    """It is the address of a PCI function, so the kernel has it; else it is behind a socket."""
    return _BDF.match(name) is not None


def _routing(name: str) -> tuple[int, int] | None:
    """Domain, and bus, device and function as one number; None: no such address."""
    if (match := _BDF.match(name)) is None:
        return None
    domain, bus, device, function = (int(part, 16) for part in match.groups())
    return domain, bus << 8 | device << 3 | function


def _from_capability(physical: HostDevice, pf: tuple[int, int], vf: tuple[int, int]) -> int | None:
    at = _find(physical)
    if at is None or pf[0] != vf[0]:
        return None
    first, stride, count = (
        physical.read(RegionIndex.CONFIG, at + place, 2) for place in (_FIRST_OFFSET, _STRIDE, _NUM_VFS)
    )
    distance = vf[1] - pf[1] - first
    if distance < 0 or (distance and (not stride or distance % stride)):
        return None
    index = distance // stride if distance else 0
    return index if index < count else None


def _find(host: HostDevice) -> int | None:
    """The place of the SR-IOV capability."""
    size = host.regions[RegionIndex.CONFIG].size
    at, seen = FIRST_EXTENDED, set[int]()
    while FIRST_EXTENDED <= at <= size - 0x40 and at not in seen:
        seen.add(at)
        head = host.read(RegionIndex.CONFIG, at, 4)
        if head & 0xFFFF == SRIOV:
            return at
        at = head >> 20 & ~3
    return None
