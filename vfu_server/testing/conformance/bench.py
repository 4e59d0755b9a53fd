"""Two devices of the plugin under test, served in this process, and what most checks do with them.

A side that a check has broken is opened anew for the next one, its model with it. It must not know what is checked.
"""

import contextlib
import importlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

from vfu_server.config import DeviceConfig, Source
from vfu_server.device import Capabilities, Device, ModelCommand
from vfu_server.errors import VfuServerError
from vfu_server.host_device import HostDevice
from vfu_server.plugins import Plugins
from vfu_server.policy import Answer, Rule, StateClass
from vfu_server.server_doors import open_host
from vfu_server.testing.client import Client
from vfu_server.testing.conformance.doors import WatchedHost
from vfu_server.testing.conformance.pace import Pace
from vfu_server.testing.conformance.records import Failed, NotJudged
from vfu_server.testing.conformance.streams import Parts, difference
from vfu_server.testing.guest import Guest
from vfu_server.testing.memory import GuestMemory
from vfu_server.testing.migrate import save
from vfu_server.testing.models import ModelProcess
from vfu_server.testing.serving import Loop, Served
from vfu_server.testing.wire import ReplyError
from vfu_server.uapi import PCI_CFG_SPACE_SIZE, MigState, RegionIndex

SIDES = ("source", "destination")
MEMORY = 1 << 20
CAPABILITIES = range(0x40, PCI_CFG_SPACE_SIZE, 2)
"""Where capabilities are in config space, in words."""
BARS = range(RegionIndex.BAR0, RegionIndex.CONFIG)
NOTHING_YET = 42  # ENOMSG


@dataclass(frozen=True, slots=True)
class Target:
    """What is under test: a model that is started for each side, or the sockets of two devices that are there."""

    name: str
    model: ModelCommand | None = None
    sockets: Sequence[str] = ()


@dataclass(slots=True)
class _Side:
    served: Served
    doors: list[WatchedHost]
    model: ModelProcess | None
    guests: list[Guest] = field(default_factory=list)


class Bench:
    """Both sides. `seed` makes what is random the same again."""

    def __init__(
        self,
        plugin: str,
        target: Target,
        *,
        plugins: Plugins | None = None,
        options: Mapping[str, str] | None = None,
        seed: int = 1,
    ) -> None:
        self.plugin = plugin
        self.target = target
        self.plugins = plugins or Plugins()
        self.options = dict(options or {})
        self.seed = seed
        self.pace = Pace(self._doing)
        self._sides: dict[str, _Side] = {}
        self._opening: list[WatchedHost] = []
        """The doors of the side that is being opened; a companion that comes later counts as its own, too."""
        self._loop: Loop | None = None

    def __enter__(self) -> Self:
        self._loop = Loop([self.pace], self._open_companion)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in SIDES:
            self._drop(name)
        if self._loop is not None:
            self._loop.close()

    @property
    def loop(self) -> Loop:
        """The loop that the devices live in."""
        if self._loop is None:
            raise RuntimeError("a Bench is used in a `with`")
        return self._loop

    def chance(self) -> random.Random:
        """The same numbers for each check, run for run."""
        return random.Random(self.seed)

    # sides

    def served(self, name: str) -> Served:
        """A side that clients can come to."""
        return self._side(name).served

    def door(self, name: str) -> WatchedHost:
        """The door of a side's own device, that its plugin goes by."""
        return self._side(name).doors[0]

    def doors(self, name: str) -> Sequence[WatchedHost]:
        """All doors that a side's plugin goes by: its own, and those of the companions that it has opened."""
        return tuple(self._side(name).doors)

    @property
    def device(self) -> Device:
        """The plugin's own device, of the source."""
        return self.served("source").inner

    @property
    def capabilities(self) -> Capabilities:
        """The device's."""
        return self.device.capabilities

    def sizes(self) -> dict[int, int]:
        """Bytes of each BAR and the ROM that the device has."""
        served = self.served("source")
        whole = {region.index: region.size for region in served.host.regions if region.index in BARS}
        return {**whole, **{index: size for index, size in served.inner.region_sizes.items() if index in BARS}}

    def renew(self, name: str) -> None:
        """The side's next client finds a device that nobody has used, as far as there is a model to be started anew."""
        self._drop(name)

    def _side(self, name: str) -> _Side:
        side = self._sides.get(name)
        if side is not None and not side.served.is_served:
            self._drop(name)
            side = None
        if side is None:
            side = self._sides[name] = self._open(name)
        return side

    def _open(self, name: str) -> _Side:
        model = None if self.target.model is None else ModelProcess(self.target.model)
        path = model.path if model is not None else self.target.sockets[SIDES.index(name)]
        doors: list[WatchedHost] = []
        self._opening = doors

        def hosting(host: HostDevice) -> HostDevice:
            doors.insert(0, WatchedHost(host))
            return cast("HostDevice", doors[0])  # by __getattr__

        try:
            served = Served(
                self.loop, self.plugin, path, name=name, options=self.options, plugins=self.plugins, hosting=hosting
            )
        except BaseException:
            if model is not None:
                model.close()
            raise
        return _Side(served, doors, model)

    async def _open_companion(self, source: Source, config: DeviceConfig) -> HostDevice:
        door = WatchedHost(await open_host(source, config))
        self._opening.append(door)
        return cast("HostDevice", door)

    def _drop(self, name: str) -> None:
        side = self._sides.pop(name, None)
        if side is None:
            return
        for guest in side.guests:
            guest.close()
        side.served.close()
        if side.model is not None:
            side.model.close()

    def tidy(self) -> None:
        """Between two checks: no client, no order, nothing noted."""
        for side in self._sides.values():
            for guest in side.guests:
                guest.close()
            side.guests.clear()
            for door in side.doors:
                door.orders.clear()
                door.lossy = False
        self.loop.records.clear()

    def _doing(self) -> str:
        """What the plugin was called for last, for reports."""
        calls = [str(side.served.device.calls[-1]) for side in self._sides.values() if side.served.device.calls]
        return " | ".join(calls)

    # guests

    @contextlib.contextmanager
    def guest(self, name: str = "source") -> Iterator[Guest]:
        """A guest with memory whose firmware has placed the BARs (the destination's has not: its state comes)."""
        side = self._side(name)
        with GuestMemory.of(MEMORY) as memory:
            guest = Guest(side.served.connect_raw(), memory, map_regions=False)
            side.guests.append(guest)
            try:
                guest.plug_in()
                guest.machine_reset()
                if name == "source":
                    guest.firmware()
                yield guest
            finally:
                guest.close()

    def disturb(self, client: Client, chance: random.Random, writes: int) -> None:
        """Write to registers that the policy lets a running guest write: to reach states other than the reset one."""
        rules = [rule for rule in self.device.policy.rules if _writable(rule)]
        for _ in range(writes if rules else 0):
            rule = chance.choice(rules)
            width = chance.choice([w for w in (1, 2, 4, 8) if rule.widths & w and w <= rule.length] or [rule.length])
            offset = rule.start + chance.randrange(0, max(1, rule.length - width + 1), width)
            with contextlib.suppress(ReplyError):
                client.write_block(rule.region, offset, chance.randbytes(width))

    def difference(self, before: bytes, after: bytes) -> str:
        """What two states differ in, for people; nothing: they are the same. Sections that the plugin calls
        unrepeatable are not compared.
        """
        if before == after:
            return ""
        described = self.plugins.describe(self.plugins.load(self.plugin), self.options)
        return difference(
            Parts.of(before).without(described.unrepeatable), Parts.of(after).without(described.unrepeatable)
        )

    def unexpected(self) -> None:
        """Failed if an exception that is no fault of vfu_server.errors came out of the plugin."""
        if found := self.loop.tracebacks():
            raise Failed(f"exceptions that no client can be answered with: {'; '.join(found)}")

    def saved(self, client: Client) -> bytes:
        """The device's whole state; it is in STOP_COPY afterwards. Failed if it cannot be had."""
        try:
            client.set_mig_state(MigState.STOP_COPY)
            return b"".join(save(client))
        except VfuServerError as error:
            raise Failed(f"the state cannot be saved: {error}; {self.why()}") from error

    def undisturbed(self) -> bytes:
        """The state of a device that nobody has used."""
        with self.guest() as guest:
            return self.saved(guest.client)

    def used(self) -> bytes:
        """The state of a device that was used: as its plugin says, else by random writes, so that it can be saved.
        NotJudged if that cannot be.
        """
        if work := self._work():
            with self.guest() as guest:
                before = {at: guest.config.read(at, 2) for at in CAPABILITIES}
                work(guest)
                guest.disable_interrupts()
                for at, value in before.items():  # interrupts go with a VMM, and there is none at the other side
                    if guest.config.read(at, 2) != value:
                        guest.config.write(at, 2, value)
                return self.saved(guest.client)
        chance = self.chance()
        for writes in (40, 20, 10, 5, 2, 1):
            with self.guest() as guest:
                self.disturb(guest.client, chance, writes)
                with contextlib.suppress(Failed):
                    return self.saved(guest.client)
        raise NotJudged(f"after random writes it cannot be saved: {self.why()}")

    def _work(self) -> Callable[[Guest], object] | None:
        """What brings the device to use, of a model only: others have their own drivers. Failed if it cannot be had."""
        named = self.plugins.describe(self.plugins.load(self.plugin), self.options).work
        if not named or self.target.model is None:
            return None
        module, _, function = named.partition(":")
        try:
            return cast("Callable[[Guest], object]", getattr(importlib.import_module(module), function))
        except (ImportError, AttributeError) as error:
            raise Failed(f"vfu_server_describe: there is no work {named!r}: {error}") from error

    def why(self) -> str:
        """The last warning or error of the log, but for the end of clients."""
        records = [record for record in list(self.loop.records) if record.levelname in ("WARNING", "ERROR")]
        said = [text for text in (record.getMessage() for record in records) if not text.startswith("client disc")]
        return f"the log says: {said[-1]}" if said else "the log says nothing"


def _writable(rule: Rule) -> bool:
    return rule.region in BARS and rule.write[StateClass.RUNNING] in (Answer.PASS, Answer.TRAP, Answer.MMAP)
