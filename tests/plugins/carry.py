"""How the plugin's tests take a device under care and carry its state to another one."""

from dataclasses import dataclass, field

from plugins.generic_dmaq.device import DmaQueueDevice
from plugins.generic_dmaq.probe import probe
from tests.plugins.fake_host import FakeHost
from vfu_server.device import SavePhase, Section, StopKind


@dataclass
class ListSink:
    """Keeps what is saved."""

    sections: list[Section] = field(default_factory=list)

    async def send(self, section: Section) -> None:
        self.sections.append(section)


def take(host: FakeHost, **options: str) -> DmaQueueDevice:
    """The device that the plugin finds behind `host`."""
    device = probe(host, {key.replace("_", "-"): value for key, value in options.items()})
    assert device is not None
    return device


async def saved(device: DmaQueueDevice) -> list[Section]:
    """Stop and save; the sections."""
    await device.stop(StopKind.FULL)
    sink = ListSink()
    await device.save(SavePhase.STOP_COPY, sink)
    return sink.sections


async def loaded(device: DmaQueueDevice, sections: list[Section]) -> None:
    """Load the sections and start."""
    await device.load_begin()
    for section in sections:
        await device.load(section)
    await device.load_done()
    await device.start(StopKind.FULL)
