"""A virtual function that Linux' mlx5-vfio-pci migrates: its states forwarded, its records checked as they pass.

It knows the driver's stream and the access policy; how states are forwarded is the kit's. The driver's own log of DMA
is used by the server through the door.
"""

import logging

from plugins.mlx5 import identity
from plugins.mlx5.records import RecordReader
from vfu_server.device import SavePhase, Section, Sink, StateIdentity
from vfu_server.errors import HostError, MigrationError
from vfu_server.host_device import HostDevice
from vfu_server.kernel_migration import KernelMigrationDevice, migration_of
from vfu_server.policy import Policy
from vfu_server.uapi import MIGRATION_PRE_COPY

log = logging.getLogger(__name__)


class KernelWay(KernelMigrationDevice):
    """One function. `firmware` may be empty where it could not be read."""

    def __init__(self, host: HostDevice, policy: Policy, firmware: str) -> None:
        super().__init__(host, policy, identity.VARIANT)
        door = migration_of(host)
        self._records = door is not None and bool(door.flags & MIGRATION_PRE_COPY)
        self._firmware = firmware
        self._saved = RecordReader()
        self._came = RecordReader()

    @property
    def identity(self) -> StateIdentity:
        """As with our own driver, but for what only the physical function knows."""
        return identity.kernel_identity(self._firmware, records=self._records)

    def check_identity(self, identity_: StateIdentity) -> None:
        identity.check(identity_, self.identity)

    async def save_begin(self) -> None:
        self._saved = RecordReader()
        await super().save_begin()

    async def save(self, phase: SavePhase, sink: Sink) -> None:
        """The driver's bytes. HostError EIO: they are not the records that a destination would take."""
        if not self._records:
            await super().save(phase, sink)
            return
        await super().save(phase, _Checked(sink, self._saved))
        if phase is SavePhase.STOP_COPY:
            try:
                self._saved.finish()
            except MigrationError as error:
                raise HostError(f"{self.host.name}: its driver's state: {error}") from error

    async def load_begin(self) -> None:
        self._came = RecordReader()
        await super().load_begin()

    async def load(self, section: Section) -> None:
        """Checked before the driver gets it. StreamFormatError."""
        if self._records:
            for _ in self._came.push(section.payload):
                pass
        await super().load(section)

    async def load_done(self) -> None:
        if self._records:
            self._came.finish()
        await super().load_done()


class _Checked:
    """A sink that looks at what has been taken."""

    def __init__(self, sink: Sink, reader: RecordReader) -> None:
        self._sink = sink
        self._reader = reader

    async def send(self, section: Section) -> None:
        """Only what has arrived counts: what was not taken comes again."""
        await self._sink.send(section)
        try:
            for _ in self._reader.push(section.payload):
                pass
        except MigrationError as error:
            raise HostError(f"its driver's state: {error}") from error
