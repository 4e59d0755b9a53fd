"""From a device's door to a device under care: which of the VFs it is, and who migrates it.

It changes nothing on the device.
"""

from collections.abc import Mapping

from plugins.hns.device import HnsDevice
from plugins.hns.facts import facts_of
from plugins.hns.kernel import HnsKernelDevice
from plugins.hns.options import parse_options
from vfu_server.device import Device
from vfu_server.host_device import HostDevice
from vfu_server.kernel_migration import migration_of


def probe(host: HostDevice, options: Mapping[str, str]) -> Device | None:
    """The device, if it is one of these VFs. Where its driver in the kernel migrates it, that is preferred.

    UsageError for a wrong option, HostError for a device that is not what its ids say.
    """
    facts = facts_of(host)
    if facts is None:
        return None
    parsed = parse_options(options)
    if migration_of(host) is not None:
        return HnsKernelDevice(host, facts)
    return HnsDevice(host, facts, parsed)
