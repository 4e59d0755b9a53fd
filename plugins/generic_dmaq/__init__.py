"""DMA queue engines without migration hardware, told by profiles: QEMU's edu and Intel I/OAT come with it.

The hooks by which the server meets this plugin; what they need is imported when they are called.
"""

from collections.abc import Iterable, Mapping

from vfu_server.device import Device, ModelCommand, Section, StateIdentity
from vfu_server.hookspecs import hookimpl
from vfu_server.host_device import HostDevice

VFU_SERVER_API = 1

SUMMARY = (
    "Simple DMA queue engines, told by profiles (QEMU edu, Intel I/OAT): stopped by letting their queues run empty"
)


@hookimpl
def vfu_server_probe(host: HostDevice, options: Mapping[str, str]) -> Device | None:
    """Take a device that a profile is for."""
    from plugins.generic_dmaq.probe import probe

    return probe(host, options)


@hookimpl
def vfu_server_models() -> Mapping[str, ModelCommand]:
    """The software models of the shipped profiles' devices."""
    module = "plugins.generic_dmaq.models"
    return {
        "edu": ModelCommand(module, "QEMU's edu device: one DMA engine, a factorial unit, a 4 KiB buffer", ("edu",)),
        "ioat": ModelCommand(module, "Intel I/OAT (CBDMA) 3.2: DMA channels over descriptor chains", ("ioat",)),
    }


@hookimpl
def vfu_server_describe(options: Mapping[str, str]) -> Mapping[str, object]:
    """A summary, and for each profile its policy, its regions' sizes and registers; arrays as large as they can be."""
    from plugins.generic_dmaq.layout import layout_of
    from plugins.generic_dmaq.probe import profiles

    layouts = {profile.name: layout_of(profile, {}) for profile in profiles(options)}
    return {
        "summary": SUMMARY,
        "policies": {name: (layout.policy, layout.sizes) for name, layout in layouts.items()},
        "registers": {name: layout.blocks for name, layout in layouts.items()},
    }


@hookimpl
def vfu_server_decode(identity: StateIdentity, section: Section) -> Iterable[str]:
    """Registers by the names of the shipped profile that the state is of, by their places if there is none."""
    from plugins.generic_dmaq.decode import decode

    return decode(identity.variant, section)
