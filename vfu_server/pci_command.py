"""The loan of bits of a function's PCI COMMAND register, whatever the guest has set there.

It must not know what is done meanwhile. The register is the guest's: only bits that were changed here are put back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vfu_server.host_device import HostDevice
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MEMORY, RegionIndex


@contextmanager
def lent_command(host: HostDevice, on: int, off: int = 0) -> Iterator[None]:
    """For the time of the `with`, bits `on` of COMMAND are set and bits `off` clear; then those that were not so before
    are put back, the others left as somebody else may have written them meanwhile. HostError: of the door.
    """
    was = host.read(RegionIndex.CONFIG, PCI_COMMAND, 2)
    changed = ((was | on) & ~off) ^ was
    if not changed:
        yield
        return
    host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, was ^ changed)
    try:
        yield
    finally:
        now = host.read(RegionIndex.CONFIG, PCI_COMMAND, 2)
        host.write(RegionIndex.CONFIG, PCI_COMMAND, 2, (now & ~changed) | (was & changed))


@contextmanager
def memory_space(host: HostDevice) -> Iterator[None]:
    """For the time of the `with`, `host` decodes memory, so its BARs can be reached; then only that bit is as it was.

    It is off at a target that waits for a state, and whenever a guest wants it to be. HostError: of the door.
    """
    with lent_command(host, PCI_COMMAND_MEMORY):
        yield
