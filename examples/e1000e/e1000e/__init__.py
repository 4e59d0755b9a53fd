"""The plugin as the server meets it: hooks, and nothing that is slow to import."""

from collections.abc import Mapping

from vfu_server.device import Device, ModelCommand
from vfu_server.errors import UsageError
from vfu_server.hookspecs import hookimpl
from vfu_server.host_device import HostDevice

VFU_SERVER_API = 1
"""The version of the plugin contract that this was written for."""


@hookimpl
def vfu_server_probe(host: HostDevice, options: Mapping[str, str]) -> Device | None:
    """Take 82574L, and nothing else."""
    from e1000e.registers import DEVICE, VENDOR

    identity = host.identity()
    if (identity.vendor, identity.device) != (VENDOR, DEVICE):
        return None
    if options:
        raise UsageError(f"e1000e knows no options, and was given {', '.join(options)}")
    from e1000e.device import E1000eDevice

    return E1000eDevice(host)


@hookimpl
def vfu_server_models() -> Mapping[str, ModelCommand]:
    """What `--model` can start."""
    return {"e1000e": ModelCommand("e1000e.model", "an 82574L whose link ends at a station that answers")}


@hookimpl
def vfu_server_describe(options: Mapping[str, str]) -> Mapping[str, object]:  # noqa: ARG001 - a hook's argument
    """What can be said without a device."""
    from e1000e.device import VARIANT
    from e1000e.policy import policy_for
    from e1000e.registers import BAR_IO, BAR_MAC, BAR_SIZES, IO, MAC

    return {
        "summary": "Intel's 82574L (QEMU's e1000e)",
        "policies": {VARIANT: (policy_for(BAR_SIZES), dict(BAR_SIZES))},
        "registers": {VARIANT: {BAR_MAC: MAC, BAR_IO: IO}},
    }
