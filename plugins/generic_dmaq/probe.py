"""From a device's door to a device under care: which profile is for it, and whether it is what the profile says.

It changes nothing on the device but for the time of a look: memory space is enabled to read how many queues there are.
"""

from collections.abc import Mapping

from plugins.generic_dmaq.device import DmaQueueDevice
from plugins.generic_dmaq.form import Profile
from plugins.generic_dmaq.hooks import hooks_of
from plugins.generic_dmaq.layout import layout_of
from plugins.generic_dmaq.options import Options, parse_options
from plugins.generic_dmaq.port import Port
from plugins.generic_dmaq.profile import find_profile, load_profile, shipped
from vfu_server.errors import HostError, UsageError
from vfu_server.host_device import HostDevice
from vfu_server.pci_command import memory_space


def probe(host: HostDevice, options: Mapping[str, str]) -> DmaQueueDevice | None:
    """The device, if a profile is for it; None if not. Options are looked at only then, or if they name a profile.

    UsageError: an option or profile is wrong or not for this device. HostError: it is not what its profile says.
    """
    wanted = options.get("profile", "")
    profile = load_profile(find_profile(wanted)) if wanted else _matching(host)
    if profile is None:
        return None
    parsed = parse_options(options)
    who = host.identity()
    if not profile.match.takes(who.vendor, who.device, who.revision):
        raise UsageError(
            f"profile {profile.name!r} ({profile.file}) is not for {host.name}, "
            f"which is {who.vendor:04x}:{who.device:04x} revision {who.revision:#04x}"
        )
    _check_bars(host, profile)
    layout = layout_of(profile, _counts(host, profile))
    return DmaQueueDevice(host, layout, hooks_of(profile), _drain_seconds(parsed, profile))


def profiles(options: Mapping[str, str]) -> list[Profile]:
    """The profile that the options name, else all shipped ones. UsageError for wrong options."""
    parsed = parse_options(options)
    paths = [find_profile(parsed.profile)] if parsed.profile else shipped()
    return [load_profile(path) for path in paths]


def _matching(host: HostDevice) -> Profile | None:
    who = host.identity()
    for path in shipped():
        profile = load_profile(path)
        if profile.match.takes(who.vendor, who.device, who.revision):
            return profile
    return None


def _drain_seconds(options: Options, profile: Profile) -> float:
    return profile.drain_seconds if options.drain_seconds is None else options.drain_seconds


def _check_bars(host: HostDevice, profile: Profile) -> None:
    for bar in profile.bars:
        found = host.regions[bar.index].size
        if found != bar.size:
            raise HostError(
                f"{host.name}: BAR{bar.index} has {found:#x} bytes, profile {profile.name!r} says {bar.size:#x}"
            )


def _counts(host: HostDevice, profile: Profile) -> dict[str, int]:
    """How many elements each array has, where the device tells."""
    if not profile.counts_from:
        return {}
    largest = {array.name: array.count for bar in profile.bars for array in bar.arrays}
    port = Port(host, {bar.index: bar.block(profile.name, {}) for bar in profile.bars})
    found = {}
    with memory_space(host):
        for array, path in profile.counts_from.items():
            found[array] = port.field(path)
            if not 1 <= found[array] <= largest[array]:
                raise HostError(
                    f"{host.name}: {path} tells {found[array]} of {array}, possible are 1 to {largest[array]}"
                )
    return found
