"""The one hook by which a plugin meets the server, and the markers for it.

A plugin is a module (or object) under the entry point group `vfu_server`. It is asked once for each device; after that
methods of the `Device` that it returned are called, never a hook again.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from vfu_server.device import Device, ModelCommand, Section, StateIdentity
    from vfu_server.host_device import HostDevice

PROJECT = "vfu_server"
API_VERSION = 1
"""Version of the plugin contract. A plugin module states the one it was written for as `VFU_SERVER_API`."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def vfu_server_probe(host: "HostDevice", options: Mapping[str, str]) -> "Device | None":
    """Take the device behind `host`, or return None if it is not one of yours.

    Called once for each device, before any client. It may read config space and registers, and must change nothing. All
    answers are collected: exactly one plugin must take the device. `options` are the operator's `--option K=V`; an
    unknown key is a UsageError. Raises UsageError (the operator's mistake), HostError (the device does not answer).
    """


@hookspec
def vfu_server_companions(where: str, options: Mapping[str, str]) -> "Iterable[str]":
    """The functions that must be open before the device at `where` (a BDF, UUID or socket's path) is, and until it is
    closed; each named as `Companions.open` takes it.

    Asked if `--plugin` names this plugin, before the device's door is opened. Needed for a VF under vfio-pci whose PF
    is, too: the kernel lets the VF in only by the token that its open PF has set, and opening the PF resets its VFs.
    Raises UsageError.
    """


@hookspec
def vfu_server_models() -> "Mapping[str, ModelCommand]":
    """The software models that this plugin ships, by the name that `--model NAME` takes."""


@hookspec
def vfu_server_describe(options: Mapping[str, str]) -> "Mapping[str, object]":
    """What `--show-policy` and `--list-plugins` print without a device.

    Keys: `summary` (one sentence); `policies`, a mapping from a variant's name (a profile, a device family) to
    `(Policy, {region index: size in bytes})`; and, if there are any, `registers`, a mapping from a variant's name (in
    its `StateIdentity`) to `{region index: Block}`, for those who read traces; `unrepeatable`, tags of sections whose
    bytes differ from save to save of the same state (images that firmware makes), for the conformance suite; `work`, as
    "module:function", what brings a model to use as a guest's driver does: the suite calls it with a started Guest.
    """


@hookspec
def vfu_server_decode(identity: "StateIdentity", section: "Section") -> "Iterable[str]":
    """What a section of this plugin's says, in lines for people: `vfu-stream` prints them.

    There is no device. The section's sums were right; what it holds is as a stranger's. Raises StreamFormatError.
    """
