"""HiSilicon's accelerators SEC2, HPRE and ZIP (Kunpeng), V3 and later: VFs migrated by their own registers.

The hooks by which the server meets this plugin; what they need is imported when they are called.
"""

from collections.abc import Iterable, Mapping

from vfu_server.device import Device, ModelCommand, Section
from vfu_server.hookspecs import hookimpl
from vfu_server.host_device import HostDevice

VFU_SERVER_API = 1

SUMMARY = "HiSilicon SEC2, HPRE and ZIP VFs (Kunpeng): paused, saved and restored by their queue manager's registers"


@hookimpl
def vfu_server_probe(host: HostDevice, options: Mapping[str, str]) -> Device | None:
    """Take a VF of one of these accelerators."""
    from plugins.hns.probe import probe

    return probe(host, options)


@hookimpl
def vfu_server_companions(where: str, options: Mapping[str, str]) -> Iterable[str]:
    """A VF under vfio-pci comes in by its PF's token only, if that is under vfio-pci, too: then the PF goes first."""
    from plugins.hns.options import NO_PF, parse_options

    pf = parse_options(options).pf
    return () if pf in (None, NO_PF) or "/" in where else (pf,)


@hookimpl
def vfu_server_models() -> Mapping[str, ModelCommand]:
    """A VF of each kind, with its PF beside it."""
    module = "plugins.hns.models"
    return {
        "zip": ModelCommand(module, "HiSilicon ZIP V3 VF with its PF: deflate and copy over queues", ("zip",)),
        "sec": ModelCommand(module, "HiSilicon SEC2 V3 VF with its PF", ("sec",)),
        "hpre": ModelCommand(module, "HiSilicon HPRE V3 VF with its PF", ("hpre",)),
    }


@hookimpl
def vfu_server_describe(options: Mapping[str, str]) -> Mapping[str, object]:
    """A summary, the policy of both modes, and the registers by the names of states' variants."""
    from plugins.hns.options import parse_options
    from plugins.hns.policy import policy_of
    from plugins.hns.registers import DOORBELL_PAGE, DOORBELL_REGION, FUNCTION, HALF, KINDS, QM_REGION, VF_SIZE

    parse_options(options)
    shown = {
        "mode VF_CTRL": {QM_REGION: HALF},
        "mode VF_CTRL with doorbell isolation, 2 queues": {QM_REGION: HALF, DOORBELL_REGION: 2 * DOORBELL_PAGE},
        "mode PF_CTRL": {QM_REGION: VF_SIZE},
    }
    return {
        "summary": SUMMARY,
        "policies": {name: (policy_of(sizes), sizes) for name, sizes in shown.items()},
        "work": "plugins.hns.models.traffic:use",
        "registers": {f"{kind.name} V{n}": {QM_REGION: FUNCTION} for kind in KINDS for n in (3, 4, 5)},
    }


@hookimpl
def vfu_server_decode(section: Section) -> Iterable[str]:
    """The kernel's blob by the names of its fields."""
    from plugins.hns.decode import decode

    return decode(section)
