"""A function as it is, under the server's care: presented, reset, and migrated if its driver in the kernel does that.

It must not know any hardware; what its regions may be used for is `layout`'s, how a driver migrates is the kit's.
"""

import logging
from collections.abc import Mapping

from plugins.vfio.layout import msix_table, policy_of
from vfu_server.device import Capabilities, Device, SavePhase, Section, Sink, StateIdentity, StopKind
from vfu_server.errors import StateError, UsageError
from vfu_server.host_device import HostDevice
from vfu_server.kernel_migration import KernelMigrationDevice, migration_of
from vfu_server.policy import Policy
from vfu_server.uapi import MIGRATION_P2P, PCI_CFG_SPACE_SIZE, RegionIndex

log = logging.getLogger(__name__)

WITHOUT_RESET = "without-reset"
CHOICES = ("refuse", "serve")
REASON = (
    "plugin vfio knows the state of no device, and this one's kernel driver does not migrate it (vfu-server doctor "
    "names one that would, if there is any)"
)


def parse_options(options: Mapping[str, str]) -> bool:
    """Whether a function without any reset is served to the next client. UsageError for anything unknown."""
    for key in options:
        if key != WITHOUT_RESET:
            raise UsageError(
                f"vfio knows no option {key!r}; known is: {WITHOUT_RESET} (what becomes of a function without any "
                f"reset when its client has gone: {' or '.join(CHOICES)})"
            )
    said = options.get(WITHOUT_RESET, CHOICES[0])
    if said not in CHOICES:
        raise UsageError(f"vfio: {WITHOUT_RESET} is {' or '.join(CHOICES)}, not {said!r}")
    return said == "serve"


def device_for(host: HostDevice, *, serve_unreset: bool = False) -> Device:
    """Any function. `serve_unreset`: without a reset, the next client gets it as the last one has left it."""
    header = host.read_block(RegionIndex.CONFIG, 0, min(PCI_CFG_SPACE_SIZE, host.regions[RegionIndex.CONFIG].size))
    table = msix_table(header)
    door = migration_of(host)
    if door is None:
        return PlainFunction(host, policy_of(host.regions, table), serve_unreset=serve_unreset)
    policy = policy_of(host.regions, table, p2p=bool(door.flags & MIGRATION_P2P))
    return MigratedFunction(host, policy, serve_unreset=serve_unreset)


class MigratedFunction(KernelMigrationDevice):
    """A function that its driver in the kernel migrates."""

    def __init__(self, host: HostDevice, policy: Policy, *, serve_unreset: bool) -> None:
        super().__init__(host, policy)
        self._serve_unreset = serve_unreset

    async def reset(self) -> None:
        if self.host.can_reset or not self._serve_unreset:
            await super().reset()
        else:
            _warn(self.host)
            await self.run_again()


class PlainFunction(Device):
    """A function that nobody can migrate."""

    def __init__(self, host: HostDevice, policy: Policy, *, serve_unreset: bool) -> None:
        super().__init__(host)
        self._serve_unreset = serve_unreset
        self._policy = policy

    @property
    def identity(self) -> StateIdentity:
        return StateIdentity("plain function", 1)

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(migratable=False, reason=REASON)

    async def reset(self) -> None:
        if self.host.can_reset or not self._serve_unreset:
            await self.host.reset()
        else:
            _warn(self.host)

    # What migration alone calls: the server offers none for this device.

    async def stop(self, kind: StopKind) -> None:
        raise _refusal()

    async def start(self, kind: StopKind) -> None:
        raise _refusal()

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        raise _refusal()

    async def load(self, section: Section) -> None:
        raise _refusal()

    async def load_done(self) -> None:
        raise _refusal()


def _warn(host: HostDevice) -> None:
    log.warning("%s has no reset: the next client gets it as it was left", host.name)


def _refusal() -> StateError:
    return StateError(f"it cannot be migrated: {REASON}")
