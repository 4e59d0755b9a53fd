"""Owns one accelerator on buses of the test's own, and a guest's driver for one of its VFs; no socket, no real time."""

import struct
from collections import deque

from plugins.hns.models.accelerator import functions
from plugins.hns.models.function import QmFunction
from plugins.hns.models.generation import Order
from plugins.hns.models.guest_driver import DeviceError, GuestDriver, Layout
from plugins.hns.models.pf import PfModel
from plugins.hns.models.traffic_work import ALGORITHM, COPY, Job
from plugins.hns.models.vf import VfModel
from plugins.hns.registers import KINDS, MAILBOX, QM_REGION
from tests.plugins.bus import FakeBus

KIND = {kind.name: kind for kind in KINDS}
ENTRY_SIZE = {"zip": 128, "sec": 128, "hpre": 64}
MSI_ENABLE = (0x82, b"\x01\x00")


class BusPort:
    """A model on a FakeBus as the driver's port."""

    def __init__(self, model: QmFunction, bus: FakeBus) -> None:
        self.model = model
        self.bus = bus

    def read(self, region: int, offset: int, width: int) -> int:
        return self.model.read(region, offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        self.model.write(region, offset, width, value)

    def store(self, region: int, offset: int, data: bytes) -> None:
        for at in (0, 8):
            self.model.write(region, offset + at, 8, int.from_bytes(data[at : at + 8], "little"))

    def load_memory(self, iova: int, length: int) -> bytes:
        assert iova + length <= len(self.bus.memory)
        return bytes(self.bus.memory[iova : iova + length])

    def store_memory(self, iova: int, data: bytes) -> None:
        assert iova + len(data) <= len(self.bus.memory)
        self.bus.memory[iova : iova + len(data)] = data

    def pause(self) -> None:
        self.bus.step(1e-5)


class Accelerator:
    """PF and VFs, each with a bus; `vf`, `port` and `bus` are those of VF 0."""

    def __init__(self, kind: str = "zip", **order: object) -> None:
        self.functions = functions(Order(KIND[kind], **order))  # type: ignore[arg-type]
        self.kind = kind
        self.buses = {name: FakeBus(model, 4 << 20) for name, model in self.functions.items()}
        for name, bus in self.buses.items():
            bus.config_write(*MSI_ENABLE) if name != "pf" else None

    @property
    def vf(self) -> VfModel:
        found = self.functions["vf0"]
        assert isinstance(found, VfModel)
        return found

    @property
    def pf(self) -> PfModel:
        found = self.functions["pf"]
        assert isinstance(found, PfModel)
        return found

    @property
    def bus(self) -> FakeBus:
        return self.buses["vf0"]

    @property
    def port(self) -> BusPort:
        return BusPort(self.vf, self.bus)

    def pf_read(self, offset: int, width: int = 4) -> int:
        return self.pf.read(QM_REGION, offset, width)

    def pf_write(self, offset: int, value: int, width: int = 4) -> None:
        self.pf.write(QM_REGION, offset, width, value)

    def read(self, offset: int, width: int = 4) -> int:
        return self.vf.read(QM_REGION, offset, width)

    def write(self, offset: int, value: int, width: int = 4) -> None:
        self.vf.write(QM_REGION, offset, width, value)

    def mailbox(self, word0: int, queue: int = 0, base: int = 0) -> int:
        """One command as raw as can be; returns the first 32 bits when it is not busy any more."""
        self.port.store(QM_REGION, MAILBOX, struct.pack("<HHQI", word0, queue, base, 0))
        for _ in range(1000):
            if not self.read(MAILBOX) & 0x2000:
                return self.read(MAILBOX)
            self.bus.step(1e-5)
        raise AssertionError("the mailbox stays busy")


class Load:
    """A driver with work whose results are looked at: driven by the messages on the bus, as a guest by interrupts."""

    def __init__(self, device: Accelerator, queues: int = 2, depth: int = 8, operation: str = COPY, **driver) -> None:
        self.device = device
        self.kind = device.kind
        self.operation = operation
        self.size = 96
        self.layout = Layout(0x10000, queues, ENTRY_SIZE[device.kind], depth, eq_depth=8, aeq_depth=4)
        self.driver = GuestDriver(device.port, self.layout, **driver)
        self.driver.start(dict.fromkeys(range(queues), ALGORITHM[operation]))
        self.jobs: list[deque[Job]] = [deque() for _ in range(queues)]
        self.numbers = [0] * queues
        self.interrupts = 0
        self.completed = 0

    def buffer(self, queue: int, index: int) -> int:
        return self.layout.end + (queue * self.layout.depth + index) * 4 * self.size

    def submit(self, queue: int = 0, count: int = 1) -> None:
        for _ in range(count):
            index = self.driver.rings[queue].sq_tail
            source = self.buffer(queue, index)
            tag = queue << 40 | self.numbers[queue]
            job = Job(self.kind, self.operation, tag, source, source + 2 * self.size, self.size)
            data = job.input
            self.driver.port.store_memory(source, data.ljust(4 * self.size, b"\xee"))
            self.jobs[queue].append(job)
            self.numbers[queue] += 1
            self.driver.submit(queue, job.entry(len(data), self.layout.entry_size))

    def fill(self) -> None:
        for queue in range(self.layout.queues):
            self.submit(queue, self.driver.room(queue))

    def handle(self) -> bool:
        """Handle one event interrupt, if one was sent."""
        sent = self.device.bus.take_messages()
        if 0 not in sent:
            return False
        self.interrupts += 1
        for queue in self.driver.events():
            self.collect(queue)
        return True

    def collect(self, queue: int) -> int:
        found = 0
        for completion in self.driver.completions(queue):
            job = self.jobs[queue].popleft()
            if self.buffer(queue, completion.sq_index) != job.source:
                raise DeviceError(f"queue {queue}: {completion.sq_index} is completed out of turn")
            result = self.driver.port.load_memory(job.destination, 2 * self.size)
            job.check(self.driver.entry(queue, completion.sq_index), result)
            found += 1
        self.completed += found
        return found

    def finish(self, limit: int = 200) -> None:
        """Let the device work, told by interrupts only, until nothing is in flight."""
        for _ in range(limit):
            if not any(self.jobs):
                return
            self.device.bus.run()
            if not self.handle():
                break
        assert not any(self.jobs), [len(jobs) for jobs in self.jobs]

    def move(self, device: Accelerator) -> None:
        """Memory and the interrupts that nobody has handled go along."""
        sent = self.device.bus.take_messages()
        device.bus.memory = self.device.bus.memory
        device.bus.messages[:0] = [vector for vector in sent if vector == 0]
        self.device = device
        self.driver.port = device.port


def counted(model: QmFunction) -> dict[str, int]:
    """The violations by name."""
    return dict(model.violations)
