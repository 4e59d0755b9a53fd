"""ConnectX and BlueField virtual functions (mlx5), whose firmware saves and restores them.

The hooks by which the server meets this plugin; what they need is imported when they are called.
"""

from collections.abc import Iterable, Mapping

from vfu_server.device import Device, ModelCommand, Section, StateIdentity
from vfu_server.hookspecs import hookimpl
from vfu_server.host_device import HostDevice

VFU_SERVER_API = 1

SUMMARY = (
    "ConnectX and BlueField virtual functions: migrated by mlx5_vfio_pci, or by commands of their physical function"
)


@hookimpl
def vfu_server_probe(host: HostDevice, options: Mapping[str, str]) -> Device | None:
    """Take a virtual function of this family."""
    from plugins.mlx5.probe import probe

    return probe(host, options)


@hookimpl
def vfu_server_companions(where: str, options: Mapping[str, str]) -> Iterable[str]:
    """A virtual function under vfio-pci whose physical function is as well comes behind it: the kernel wants that."""
    return [options["pf"]] if options.get("pf") and "/" not in where else []


@hookimpl
def vfu_server_models() -> Mapping[str, ModelCommand]:
    """The software model: a virtual function and, beside it, its physical function."""
    summary = "ConnectX: a virtual function, and its physical function at the socket beside it"
    return {"connectx": ModelCommand("plugins.mlx5.models", summary, ("connectx",))}


@hookimpl
def vfu_server_describe(options: Mapping[str, str]) -> Mapping[str, object]:
    """A summary, and the policy of a function that stands for all."""
    from plugins.mlx5.identity import BARE_VARIANT, VARIANT
    from plugins.mlx5.options import parse
    from plugins.mlx5.policy import EXAMPLE, EXAMPLE_TABLE, policy_of
    from plugins.mlx5.traces import TRACED

    parse(options)
    sizes = {region.index: region.size for region in EXAMPLE}
    name = f"for example: a BAR of {EXAMPLE[0].size:#x} bytes with its MSI-X table at {EXAMPLE_TABLE.offset:#x}"
    return {
        "summary": SUMMARY,
        "policies": {name: (policy_of(EXAMPLE, EXAMPLE_TABLE, p2p=True), sizes)},
        "unrepeatable": ["kernel"],  # the card's image of a function holds counters of its own
        "registers": {variant: {0: TRACED} for variant in (VARIANT, BARE_VARIANT)},
    }


@hookimpl
def vfu_server_decode(identity: StateIdentity, section: Section) -> Iterable[str]:
    """The records that begin with a section."""
    from plugins.mlx5.decode import decode

    return decode(identity.variant, section)
