"""Any function as it is: every access passed on, nothing known of its state; migrated, if at all, by its kernel driver.

The hooks by which the server meets this plugin; what they need is imported when they are called.
"""

from collections.abc import Mapping

from vfu_server.device import Device
from vfu_server.hookspecs import hookimpl
from vfu_server.host_device import HostDevice

VFU_SERVER_API = 1
VFU_SERVER_BY_NAME_ONLY = True
"""It would take every device there is, also those that another plugin could migrate."""

SUMMARY = "Any function as it is; migrated only if its driver in the kernel does that; by --plugin vfio only"


@hookimpl
def vfu_server_probe(host: HostDevice, options: Mapping[str, str]) -> Device | None:
    """Take the device, whatever it is."""
    from plugins.vfio.device import device_for, parse_options

    return device_for(host, serve_unreset=parse_options(options))


@hookimpl
def vfu_server_describe(options: Mapping[str, str]) -> Mapping[str, object]:
    """A summary, and the policy of a function that stands for all."""
    from plugins.vfio.device import parse_options
    from plugins.vfio.layout import EXAMPLE, EXAMPLE_TABLE, policy_of

    parse_options(options)
    sizes = {region.index: region.size for region in EXAMPLE}
    name = f"for example: a BAR of {EXAMPLE[0].size:#x} bytes with its MSI-X table at {EXAMPLE_TABLE.offset:#x}"
    return {"summary": SUMMARY, "policies": {name: (policy_of(EXAMPLE, EXAMPLE_TABLE), sizes)}}
