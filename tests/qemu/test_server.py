"""Debian's QEMU as the client of `vfu-server --model edu`, its qtest channel as the guest's processor.

A message-signalled interrupt is aimed at guest memory, where it can be read; the pin is seen in the old controller.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lanes import lane_unavailable
from tests.qemu.qtest import Qtest, machine
from tests.server.programs import Server
from tools.debian_root import RootError
from tools.qemu_root import QemuRoot, qemu_root

pytestmark = pytest.mark.qemu

SLOT = 4
BAR = 0xFEB00000
MAILBOX = 0x300000
MSI = 0x40
SECONDS = 10.0

MEMORY = ("-object", "memory-backend-memfd,id=ram,size=64M,share=on", "-machine", "q35,memory-backend=ram")


@pytest.fixture(scope="module")
def qemu() -> QemuRoot:
    try:
        return qemu_root()
    except RootError as error:
        lane_unavailable(str(error))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server("--plugin", "generic_dmaq", "--model", "edu", "--socket-path", tmp_path / "edu.sock") as started:
        started.wait_log("listening")
        yield started


def device(tmp_path: Path, **more: object) -> str:
    socket = {"type": "unix", "path": str(tmp_path / "edu.sock")}
    return json.dumps({"driver": "vfio-user-pci", "id": "edu", "addr": f"{SLOT:#x}", "socket": socket} | more)


@contextmanager
def guest(qemu: QemuRoot, tmp_path: Path) -> Iterator[Qtest]:
    with machine(qemu, [*MEMORY, "-device", device(tmp_path)]) as qtest:
        place(qtest)
        yield qtest


def place(qtest: Qtest) -> None:
    """What firmware and a driver do: the BAR, memory decoding, bus mastering."""
    qtest.config_write(SLOT, 0x10, 4, BAR)
    qtest.config_write(SLOT, 0x04, 2, 0x6)


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, what


def dma(qtest: Qtest, source: int, destination: int, count: int, command: int) -> None:
    for offset, value in ((0x80, source), (0x88, destination), (0x90, count), (0x98, command)):
        qtest.write(BAR + offset, 4, value)
    until(lambda: not qtest.read(BAR + 0x98, 4) & 1, "the device's DMA does not end")


def route_pins_to_irq_11(qtest: Qtest) -> None:
    """All pins of the chipset to line 11 of the old interrupt controller, level triggered."""
    for register in (*range(0x60, 0x64), *range(0x68, 0x6C)):
        qtest.config_write(31, register, 1, 11)
    qtest.ask("outb 0x4d1 0x08")


def pin_is_raised(qtest: Qtest) -> bool:
    qtest.ask("outb 0xa0 0x0a")
    return bool(int(qtest.ask("inb 0xa0")[0], 16) & 0x08)


def test_enumeration_and_registers(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    with guest(qemu, tmp_path) as qtest:
        assert qtest.config_read(SLOT, 0, 4) == 0x11E81234
        assert qtest.config_read(SLOT, 8, 4) == 0x00FF0010
        qtest.config_write(SLOT, 0x10, 4, 0xFFFFFFFF)
        assert qtest.config_read(SLOT, 0x10, 4) == 0xFFF00000
        place(qtest)
        assert qtest.read(BAR, 4) == 0x010000ED
        qtest.write(BAR + 4, 4, 0x12345678)
        assert qtest.read(BAR + 4, 4) == 0xEDCBA987
        qtest.write(BAR + 8, 4, 12)
        until(lambda: not qtest.read(BAR + 0x20, 4) & 1, "the factorial does not end")
        assert qtest.read(BAR + 8, 4) == 479001600


def test_dma_both_ways_through_shared_memory(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    data = bytes(range(256)) * 16
    with guest(qemu, tmp_path) as qtest:
        qtest.store(0x100000, data)
        dma(qtest, 0x100000, 0x40000, len(data), 1)
        dma(qtest, 0x40000, 0x200000, len(data), 3)
        assert qtest.load(0x200000, len(data)) == data


def test_dma_by_messages_where_memory_is_not_shared(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4
    with machine(qemu, ["-device", device(tmp_path)]) as qtest:
        place(qtest)
        qtest.store(0x100000, data)
        dma(qtest, 0x100000, 0x40000, len(data), 1)
        dma(qtest, 0x40000, 0x200000, len(data), 3)
        assert qtest.load(0x200000, len(data)) == data
    assert "without a file descriptor" in server.wait_log("share=on")


def test_message_signalled_interrupt(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    with guest(qemu, tmp_path) as qtest:
        qtest.write(MAILBOX, 4, 0)
        qtest.config_write(SLOT, MSI + 4, 4, MAILBOX)
        qtest.config_write(SLOT, MSI + 8, 4, 0)
        qtest.config_write(SLOT, MSI + 12, 2, 0x4321)
        qtest.config_write(SLOT, MSI + 2, 2, 0x81)
        for bits, data in ((0x1, 0x4321), (0x2, 0x1234)):
            qtest.config_write(SLOT, MSI + 12, 2, data)
            qtest.write(BAR + 0x60, 4, bits)
            until(lambda data=data: qtest.read(MAILBOX, 4) == data, f"message {data:#x} does not arrive")
            qtest.write(MAILBOX, 4, 0)
    assert server.wait_log("the client has never asked").count("never asked") == 1


def test_pin_interrupt(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    with guest(qemu, tmp_path) as qtest:
        route_pins_to_irq_11(qtest)
        assert not pin_is_raised(qtest)
        qtest.write(BAR + 0x60, 4, 0x10)
        until(lambda: pin_is_raised(qtest), "the pin is not raised")
        assert qtest.read(BAR + 0x24, 4) == 0x10
        qtest.write(BAR + 0x64, 4, 0x10)
        assert qtest.read(BAR + 0x24, 4) == 0
        until(lambda: not pin_is_raised(qtest), "the pin is not lowered")


def test_machine_reset(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    with guest(qemu, tmp_path) as qtest:
        qtest.write(BAR + 4, 4, 0xFFFFFFFF)
        qtest.reset()
        assert not qtest.config_read(SLOT, 4, 2) & 0x6
        assert qtest.config_read(SLOT, 0x10, 4) == 0
        place(qtest)
        assert qtest.read(BAR, 4) == 0x010000ED


def test_hot_plug_and_unplug(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    pc = ("-object", "memory-backend-memfd,id=ram,size=64M,share=on", "-machine", "pc,memory-backend=ram")
    with machine(qemu, pc) as qtest:
        for _ in range(3):
            qtest.execute("device_add", json.loads(device(tmp_path)))
            place(qtest)
            assert qtest.read(BAR, 4) == 0x010000ED
            qtest.execute("device_del", {"id": "edu"})
            qtest.ask("outl 0xae10 0x0")
            qtest.ask(f"outl 0xae08 {1 << SLOT:#x}")
            until(lambda: qtest.config_read(SLOT, 0, 4) == 0xFFFFFFFF, "the device does not leave")
            server.wait_log("client disconnected")
            server.log = ""


def test_a_second_machine_is_refused_and_lives(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    pc = ("-object", "memory-backend-memfd,id=ram,size=64M,share=on", "-machine", "pc,memory-backend=ram")
    with guest(qemu, tmp_path) as first, machine(qemu, pc) as second:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="Device or resource busy"):
                second.execute("device_add", json.loads(device(tmp_path)))
        second.store(0x100000, b"alive")
        assert second.load(0x100000, 5) == b"alive"
        assert first.read(BAR, 4) == 0x010000ED


def test_client_killed_and_another_served(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    with guest(qemu, tmp_path) as qtest:
        qtest.write(BAR + 0x60, 4, 0x77)
        qtest.process.kill()
    with guest(qemu, tmp_path) as qtest:
        assert qtest.read(BAR + 0x24, 4) == 0
        assert qtest.read(BAR, 4) == 0x010000ED
    assert server.process.poll() is None


def test_server_killed_leaves_the_machine_alive(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    with guest(qemu, tmp_path) as qtest:
        server.process.kill()
        server.process.wait()
        until(lambda: qtest.read(BAR, 4) == 0xFFFFFFFF, "a dead device does not read as all ones")
        qtest.store(0x100000, b"alive")
        assert qtest.load(0x100000, 5) == b"alive"


def test_a_restarted_server_serves_a_new_machine(qemu: QemuRoot, server: Server, tmp_path: Path) -> None:
    server.process.kill()
    server.process.wait()
    with Server("--plugin", "generic_dmaq", "--model", "edu", "--socket-path", tmp_path / "edu.sock") as second:
        second.wait_log("listening")
        with guest(qemu, tmp_path) as qtest:
            assert qtest.read(BAR, 4) == 0x010000ED
        status, _ = second.end()
        assert status == 0
