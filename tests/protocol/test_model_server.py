"""A software model as a real process: registers, interrupts, DMA, resets, one client after another, and its control."""

import errno
import os
import signal
import socket
import struct
import time

import pytest

from tests.model_process import TREE, ModelProcess, run_model
from tests.server.programs import install
from vfu_server import uapi
from vfu_server.errors import VfuServerError
from vfu_server.testing import Client, EduDriver, Guest, GuestMemory, Interrupts, ReplyError
from vfu_server.uapi import IrqIndex, RegionIndex

CONFIG = RegionIndex.CONFIG
MB = 1 << 20
DMA = (0x80, 0x88, 0x90, 0x98)


@pytest.fixture(scope="module")
def shared_edu(tmp_path_factory):
    """One edu for all tests of this file that leave it idle; the client of each starts from a bus reset."""
    with ModelProcess(tmp_path_factory.mktemp("edu"), "edu") as model:
        yield model


@pytest.fixture
def edu(shared_edu):
    shared_edu.control("clear")
    yield shared_edu
    assert shared_edu.process.poll() is None


@pytest.fixture
def ioat(tmp_path):
    with ModelProcess(tmp_path, "ioat", "--channels", "2") as model:
        yield model


@pytest.fixture
def guest(edu):
    with Guest.connect(edu.path, GuestMemory.of(MB)) as guest:
        yield guest.start()
        guest.write(0, 0x64, 4, 0xFFFFFFFF)


def refused(call, *args, **kwargs) -> int:
    """The errno of a call that must fail."""
    with pytest.raises(VfuServerError) as caught:
        call(*args, **kwargs)
    return caught.value.errno


# what a client sees


def test_edu_as_vfio_pci_would_show_it(edu) -> None:
    with Client.connect(edu.path) as client:
        client.negotiate()
        info = client.get_info()
        assert (info.flags, info.num_regions, info.num_irqs) == (uapi.DEVICE_FLAGS_PCI, 9, 5)
        assert [client.get_region_info(i).size for i in range(9)] == [MB, 0, 0, 0, 0, 0, 0, 256, 0]
        irqs = [client.get_irq_info(i) for i in range(5)]
        assert [(i.count, i.flags) for i in irqs] == [(1, 7), (1, 9), (0, 9), (0, 9), (1, 9)]
        assert refused(client.reset) == errno.EINVAL


def test_ioat_as_vfio_pci_would_show_it(ioat) -> None:
    with Client.connect(ioat.path) as client:
        client.negotiate()
        assert client.get_info().flags == uapi.DEVICE_FLAGS_PCI | uapi.DEVICE_FLAGS_RESET
        assert [client.get_region_info(i).size for i in range(9)] == [0x4000, 0, 0, 0, 0, 0, 0, 4096, 0]
        assert [client.get_irq_info(i).count for i in range(5)] == [1, 0, 2, 1, 1]
        assert client.region_read(CONFIG, 0, 4096)[:4] == b"\x86\x80\x20\x2f"


@pytest.mark.parametrize("feature", [1, 2, 6, 7, 8, 9, 10, 12])
def test_features_are_enotty(edu, feature: int) -> None:
    with Client.connect(edu.path) as client:
        client.negotiate()
        assert refused(client.device_feature, feature | uapi.FEATURE_PROBE) == errno.ENOTTY
        assert refused(client.feature_get, feature) == errno.ENOTTY


def test_config_space_in_any_width(edu) -> None:
    with Client.connect(edu.path) as client:
        client.negotiate()
        whole = client.region_read(CONFIG, 0, 256)
        assert whole[:4] == b"\x34\x12\xe8\x11"
        assert client.region_read(CONFIG, 1, 3) == whole[1:4]
        client.region_write(CONFIG, 0x3B, b"\x00\x55\x66")
        assert client.region_read(CONFIG, 0x3A, 5) == b"\x00\x00\x55\x01\x00"
        client.region_write(CONFIG, 0, b"\xff" * 256)
        assert client.region_read(CONFIG, 0x10, 4) == b"\x00\x00\xf0\xff"
        assert refused(client.region_read, CONFIG, 250, 8) == errno.EINVAL
        assert refused(client.region_write, CONFIG, 256, b"1") == errno.EINVAL


def test_registers_and_blocks(edu) -> None:
    with Client.connect(edu.path) as client:
        client.negotiate()
        assert client.read(0, 0, 4) == 0x010000ED
        client.write(0, 4, 4, 0x0F0F0F0F)
        assert [client.read(0, 4, width) for width in (1, 2, 4)] == [0, 0, 0xF0F0F0F0]
        for offset, value in zip(DMA[:3], (1, 2, 3), strict=True):
            client.write(0, offset, 8, value)
        assert client.region_read(0, 0x80, 24) == struct.pack("<QQQ", 1, 2, 3)
        client.region_write(0, 0x84, b"\xff" * 4 + struct.pack("<Q", 9) + b"\xff" * 2)
        assert client.region_read(0, 0x80, 24) == struct.pack("<QQQ", 1, 9, 3)
        client.write(0, 0x9C, 8, 0x11)
        client.write(0, 0x01, 8, 0x55AA55AA << 24)
        assert (client.read(0, 4, 4), client.read(0, 1, 8)) == (0xAA55AA55, 0xAA55AA55 << 24)
        client.write(0, 4, 4, 0xFFFFFFFF)
        client.write(0, 4, 4, 0, posted=True)
        assert client.read(0, 4, 4) == 0xFFFFFFFF


def test_msix_table_is_the_clients(ioat) -> None:
    with Client.connect(ioat.path) as client:
        client.negotiate()
        client.write(0, 0x2000, 8, 0xFEE00000)
        assert client.read(0, 0x2000, 8) == (1 << 64) - 1
        assert (client.read(0, 0x201C, 4), client.read(0, 0x3000, 8)) == (0xFFFFFFFF, 0)


# interrupts


@pytest.mark.parametrize("kind", ["msi", "intx", "polled"])
def test_factorial_and_dma(guest, kind: str) -> None:
    driver = EduDriver(guest)
    if kind != "polled":
        getattr(driver, f"use_{kind}")()
    assert driver.factorial(12) == 479001600
    guest.memory.write(0x5000, b"there and back")
    driver.copy_to_device(0x5000, 14, 0x10)
    driver.copy_from_device(0x6000, 14, 0x10)
    assert guest.memory.read(0x6000, 15) == b"there and back\0"
    driver.guest.write(0, 0x20, 4, 0)


def test_intx_masks_itself_and_comes_again(guest) -> None:
    interrupts = guest.interrupts
    assert interrupts.index == IrqIndex.INTX
    guest.write(0, 0x60, 4, 1)
    assert interrupts.wait() == 1
    assert guest.config.read(uapi.PCI_STATUS, 2) & uapi.PCI_STATUS_INTERRUPT
    guest.write(0, 0x60, 4, 1)
    assert interrupts.count() == 0
    interrupts.unmask()
    assert interrupts.wait() == 1
    guest.config.write(uapi.PCI_COMMAND, 2, 0x406)
    interrupts.unmask()
    assert interrupts.count() == 0
    guest.config.write(uapi.PCI_COMMAND, 2, 0x006)
    assert interrupts.wait() == 1
    guest.write(0, 0x64, 4, 1)
    assert not guest.config.read(uapi.PCI_STATUS, 2) & uapi.PCI_STATUS_INTERRUPT
    interrupts.unmask()
    assert interrupts.count() == 0


def test_resample_eventfd_unmasks(guest) -> None:
    interrupts = guest.interrupts
    flags = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_UNMASK
    with Interrupts(guest.client, IrqIndex.INTX) as resample:
        for _ in range(2):
            guest.client.set_irqs(IrqIndex.INTX, flags, 0, 1, fds=resample.fds)
            guest.write(0, 0x60, 4, 1)
            assert interrupts.wait() == 1
            for _ in range(2):
                os.eventfd_write(resample.fds[0], 1)
                assert interrupts.wait() == 1
            guest.write(0, 0x64, 4, 1)
            os.eventfd_write(resample.fds[0], 1)
            guest.client.set_irqs(IrqIndex.INTX, flags, 0, 1)


def test_messages_need_bus_mastering(guest) -> None:
    interrupts = guest.enable_msi()
    guest.config.write(uapi.PCI_COMMAND, 2, 0x002)
    guest.write(0, 0x60, 4, 1)
    assert interrupts.count() == 0
    guest.config.write(uapi.PCI_COMMAND, 2, 0x006)
    guest.write(0, 0x60, 4, 1)
    assert interrupts.wait() == 1


def test_enabling_messages_lowers_intx(guest) -> None:
    guest.write(0, 0x60, 4, 1)
    assert guest.interrupts.wait() == 1
    guest.enable_msi()
    assert not guest.config.read(uapi.PCI_STATUS, 2) & uapi.PCI_STATUS_INTERRUPT
    guest.write(0, 0x64, 4, 1)
    guest.arm_interrupts(IrqIndex.INTX, 1)
    assert guest.interrupts.count() == 0


def test_set_irqs_refusals_reach_the_client(guest) -> None:
    client = guest.client
    trigger = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER
    with Interrupts(client, IrqIndex.MSI) as spare:
        assert refused(client.set_irqs, IrqIndex.MSI, trigger, 0, 1, fds=spare.fds) == errno.EINVAL
        assert refused(client.set_irqs, IrqIndex.MSIX, trigger, 0, 1, fds=spare.fds) == errno.EINVAL
        assert refused(client.set_irqs, IrqIndex.MSI, 0x9, 0, 1) == errno.ENOTTY
    read, write = os.pipe()
    assert refused(client.set_irqs, IrqIndex.REQ, trigger, 0, 1, fds=[write]) == errno.EINVAL
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)


# DMA


def transfer(guest: Guest, source: int, destination: int, count: int, command: int) -> None:
    for offset, value in zip(DMA, (source, destination, count, command | 1), strict=True):
        guest.write(0, offset, 8, value)
    deadline = time.monotonic() + 5
    while guest.read(0, 0x98, 8) & 1:
        guest.client.serve(0.001)
        assert time.monotonic() < deadline


def test_dma_through_shared_memory_messages_and_holes(edu) -> None:
    """Pages 0: shared, 1: messages, 2: read-only messages, 3: nothing, 4: read-only shared."""
    memory = GuestMemory()
    memory.add(0x0000, 0x1000)
    memory.add(0x1000, 0x1000, shared=False)
    memory.add(0x2000, 0x1000, shared=False, prot=uapi.DMA_FLAG_READ)
    memory.add(0x4000, 0x1000, prot=uapi.DMA_FLAG_READ)
    with Guest.connect(edu.path, memory) as guest:
        guest.start()
        memory.write(0x0000, b"\x11" * 0x1000 + b"\x22" * 0x1000 + b"\x33" * 0x1000)
        memory.write(0x4000, b"\x44" * 0x1000)
        transfer(guest, 0x0800, 0x40000, 0x1000, 0)
        assert (guest.client.dma_reads, guest.client.dma_writes) == (1, 0)
        transfer(guest, 0x40000, 0x1800, 0x1000, 2)
        assert (guest.client.dma_reads, guest.client.dma_writes) == (1, 1)
        assert memory.read(0x1800, 0x1000) == b"\x11" * 0x800 + b"\x33" * 0x800
        transfer(guest, 0x2800, 0x40000, 0x1000, 0)
        transfer(guest, 0x40000, 0x0000, 0x1000, 2)
        assert memory.read(0x0000, 0x1000) == b"\x33" * 0x800 + bytes(0x800)
        transfer(guest, 0x40000, 0x4000, 0x1000, 2)
        assert memory.read(0x4000, 0x1000) == b"\x44" * 0x1000
        guest.config.write(uapi.PCI_COMMAND, 2, 2)
        transfer(guest, 0x40000, 0x0000, 4, 2)
        assert memory.read(0, 4) == b"\x33" * 4
        guest.client.dma_unmap_all()
        assert edu.control("state")["dma_maps"] == 0


def test_small_transfer_limit_of_the_client(edu) -> None:
    memory = GuestMemory()
    memory.add(0, 0x2000, shared=False)
    client = Client.connect(edu.path, memory=memory)
    with client:
        client.negotiate({"max_data_xfer_size": 512})
        memory.map_into(client)
        client.region_write(CONFIG, 4, b"\x06\x00")
        memory.write(0, bytes(range(256)) * 8)
        guest = Guest(client, memory)
        transfer(guest, 0x10, 0x40000, 0x400, 0)
        transfer(guest, 0x40000, 0x1000, 0x400, 2)
        assert memory.read(0x1000, 0x400) == memory.read(0x10, 0x400)
        assert (client.dma_reads, client.dma_writes) == (2, 2)


def test_memory_that_was_cut_short_is_survived(edu) -> None:
    with Guest.connect(edu.path, GuestMemory.of(0x4000)) as guest:
        guest.start()
        guest.memory.write(0x1000, b"\x77" * 0x1000)
        transfer(guest, 0x1000, 0x40000, 0x1000, 0)
        os.ftruncate(guest.memory.fd, 0x1000)
        transfer(guest, 0x40000, 0x2000, 0x1000, 2)
        transfer(guest, 0x1000, 0x40000, 0x800, 0)
        transfer(guest, 0x40000, 0x0000, 0x1000, 2)
        assert guest.memory.read(0, 0x1000) == bytes(0x800) + b"\x77" * 0x800


class Interfering(GuestMemory):
    """Asks the server for something before it answers a DMA message, as QEMU does under its big lock."""

    def __init__(self) -> None:
        super().__init__()
        self.guest: Guest | None = None
        self.calls = 0

    def dma_read(self, iova: int, length: int) -> bytes:
        if self.guest is not None:
            self.calls += 1
            assert self.guest.read(0, 0x98, 8) & 1
            self.guest.arm_interrupts(IrqIndex.MSI, 1)
            self.guest.arm_interrupts(IrqIndex.INTX, 1)
            assert refused(self.guest.client.reset) == errno.EINVAL
            self.guest.client.dma_map(0x100000, 0x1000)
        return super().dma_read(iova, length)


def test_a_client_that_waits_for_us_while_we_wait_for_it(edu) -> None:
    memory = Interfering()
    memory.add(0, 0x1000, shared=False)
    with Guest.connect(edu.path, memory) as guest:
        guest.start()
        memory.guest = guest
        memory.write(0, b"late answer")
        started = time.monotonic()
        transfer(guest, 0, 0x40000, 11, 0)
        transfer(guest, 0x40000, 0x800, 11, 2)
        assert memory.read(0x800, 11) == b"late answer"
        assert memory.calls == 1
        assert time.monotonic() - started < 4.5


def test_a_client_that_leaves_in_the_middle_of_a_dma(edu) -> None:
    memory = GuestMemory()
    memory.add(0, 0x1000, shared=False)
    with Guest.connect(edu.path, memory) as guest:
        guest.start()
        for offset, value in zip(DMA, (0, 0x40000, 16, 1), strict=True):
            guest.client.write(0, offset, 8, value)
        guest.client.recv_message(2.0)
    with Guest.connect(edu.path, GuestMemory.of(MB)) as guest:
        guest.start()
        deadline = time.monotonic() + 5
        while guest.read(0, 0x98, 8) & 1:
            assert time.monotonic() < deadline
        assert EduDriver(guest).factorial(5) == 120


@pytest.mark.parametrize(
    ("flags", "iova", "size", "error"),
    [(7, 0, 4096, errno.EINVAL), (3, 0x800, 4096, errno.EINVAL), (3, 0, 0, errno.EINVAL)],
)
def test_bad_maps_are_refused(edu, flags: int, iova: int, size: int, error: int) -> None:
    with Client.connect(edu.path) as client:
        client.negotiate()
        assert refused(client.dma_map, iova, size, prot=flags) == error


# clients, one after another


def test_state_survives_a_client_and_config_does_not(edu) -> None:
    with Guest.connect(edu.path, GuestMemory.of(MB)) as guest:
        guest.start()
        guest.write(0, 4, 4, 0x12345678)
        guest.write(0, 0x60, 4, 0x10)
        guest.interrupts.wait()
    with Guest.connect(edu.path, GuestMemory.of(MB)) as guest:
        assert guest.client.negotiate()
        assert guest.config.read(uapi.PCI_COMMAND, 2) == 0
        assert guest.config.read(uapi.PCI_BASE_ADDRESS_0, 4) == 0
        assert not guest.config.read(uapi.PCI_STATUS, 2) & uapi.PCI_STATUS_INTERRUPT
        assert guest.client.read(0, 4, 4) == 0xEDCBA987
        assert guest.client.read(0, 0x24, 4) == 0x10
        guest.client.write(0, 0x64, 4, 0x10)
    state = edu.control("state")
    assert (state["irq_mode"], state["intx"], state["dma_maps"]) == (None, False, 0)


def test_a_second_client_is_told_that_the_device_is_taken(guest, edu) -> None:
    started = time.monotonic()
    with Client.connect(edu.path) as second:
        with pytest.raises(ReplyError) as caught:
            second.negotiate()
        assert caught.value.errno == errno.EBUSY
        second.wait_closed(4.5)
    assert time.monotonic() - started < 4.5
    assert guest.read(0, 0, 4) == 0x010000ED


def test_clients_that_come_right_after_another(edu) -> None:
    with Client.connect(edu.path) as client:
        client.negotiate()
        before = edu.fds()
    for _ in range(30):
        with Client.connect(edu.path) as client:
            client.negotiate()
            assert client.read(0, 0, 4) == 0x010000ED
    for _ in range(5):
        Client.connect(edu.path).close()
    with Guest.connect(edu.path) as guest:
        guest.start()
    with Client.connect(edu.path) as client:
        client.negotiate()
        assert edu.fds() == before


def test_resets_of_ioat(ioat) -> None:
    with Guest.connect(ioat.path) as guest:
        guest.start()
        for reset in ("message", "config", "disconnect"):
            guest.write(0, 0x02, 1, 5)
            guest.write(0, 0x98, 4, 0x800)
            assert ioat.registers()["genctrl"] == 5
            if reset == "message":
                guest.client.reset()
            elif reset == "config":
                guest.config.write(0x98, 2, 0xA810)
                assert guest.config.read(0x98, 2) == 0x2810
            else:
                guest.close()
                break
            assert guest.config.read(uapi.PCI_COMMAND, 2) == 0
            assert ioat.registers()["channel[0].chancmp"] == 0
            guest.firmware()
    with Client.connect(ioat.path) as client:
        client.negotiate()
        assert client.read(0, 0x02, 1) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_ioat_copies_and_signals_a_vector(ioat, shared: bool) -> None:
    memory = GuestMemory()
    memory.add(0, MB, shared=shared)
    base = 0x100
    with Guest.connect(ioat.path, memory) as guest:
        guest.start()
        interrupts = guest.enable_msix()
        guest.write(0, 0x03, 1, 8)
        guest.write(0, base + 0x04, 1, 0x20)
        while guest.read(0, base + 0x04, 1):
            guest.client.serve(0)
        for offset, value in ((0x10, 0x1000), (0x14, 0), (0x18, 0x800), (0x1C, 0)):
            guest.write(0, base + offset, 4, value)
        guest.write(0, base, 2, 0x1D)
        data = os.urandom(150_000)
        memory.write(0x20000, data)
        memory.write(0x1000, struct.pack("<IIQQQ32x", len(data), 9, 0x20000, 0x80000, 0x1040))
        guest.write(0, base + 0x06, 2, 1)
        assert interrupts.wait(1) == 1
        assert memory.read(0x80000, len(data)) == data
        assert int.from_bytes(memory.read(0x800, 8), "little") == 0x1001
        assert guest.read(0, base + 0x08, 8) == 0x1001
        assert (guest.client.dma_reads > 1) != shared


# control


def test_control_counts_what_reaches_the_model(guest, edu) -> None:
    edu.control("clear")
    assert edu.accesses() == 0
    before = time.monotonic()
    guest.read(0, 0, 4)
    guest.write(0, 4, 4, 7)
    guest.write(0, 4, 4, 8)
    guest.config.read(0, 2)
    report = edu.control("accesses")
    assert report["total"] == 4
    assert {(r["region"], r["offset"], r["write"]): r["count"] for r in report["counts"]} == {
        (0, 0, False): 1,
        (0, 4, True): 2,
        (7, 0, False): 1,
    }
    last = report["last"]
    assert [(a["region"], a["offset"], a["width"], a["value"], a["write"]) for a in last] == [
        (0, 0, 4, 0x010000ED, False),
        (0, 4, 4, 7, True),
        (0, 4, 4, 8, True),
        (7, 0, 2, 0x1234, False),
    ]
    assert before <= last[0]["time"] <= last[-1]["time"] <= time.monotonic()
    assert edu.registers()["liveness"] == 0xFFFFFFF7
    assert edu.accesses(0) == 3


def test_control_orders_faults(guest, edu) -> None:
    guest.memory.write(0x1000, b"\x10" * 4)
    edu.control("fault", name="bit-flip", times=1)
    transfer(guest, 0x1000, 0x40000, 4, 0)
    transfer(guest, 0x40000, 0x2000, 4, 2)
    assert guest.memory.read(0x2000, 4) == b"\x10\x10\x10\x11"


def test_control_answers_mistakes(edu) -> None:
    for line in (
        b"",
        b"nonsense",
        b"[]",
        b"{}",
        b'{"op": "dance"}',
        b'{"op": "fault"}',
        b'{"op": "fault", "name": 1, "times": "x"}',
    ):
        assert "error" in edu.control_line(line)
    assert edu.control("clear") == {}


# the process


def test_ready_sigterm_and_time_scale(tmp_path) -> None:
    with ModelProcess(tmp_path, "edu", time_scale=2.0) as model:
        assert model.ready == f"ready {model.path}\n"
        assert model.path.stat().st_mode & 0o777 == 0o600
        with Guest.connect(model.path) as guest:
            guest.start()
            started = time.monotonic()
            transfer(guest, 0x40000, 0x40000, 0, 0)
            assert 0.2 <= time.monotonic() - started < 4.5
            status, said = model.terminate()
        assert (status, said) == (0, "")
        assert not model.path.exists()


def test_it_ends_with_its_starter(tmp_path) -> None:
    with ModelProcess(tmp_path, "edu") as model, Client.connect(model.path) as client:
        client.negotiate()
        os.close(model.life)
        model.life = -1
        assert model.wait() == (0, "")
        client.wait_closed(1.0)


def test_an_inherited_socket_and_a_left_over_one(tmp_path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "given.sock"))
        listener.listen()
        with ModelProcess(tmp_path, "edu", listener=listener), Client.connect(tmp_path / "given.sock") as client:
            client.negotiate()
            assert client.read(0, 0, 4) == 0x010000ED
    (tmp_path / "given.sock").rename(tmp_path / "model.sock")
    with ModelProcess(tmp_path, "edu") as model, Client.connect(model.path) as client:
        client.negotiate()
        again = run_model("edu", "--socket-path", str(model.path))
        assert (again.returncode, again.stderr) == (1, f"{model.path}: Address already in use\n")
        model.process.send_signal(signal.SIGINT)
        assert model.wait()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["edu"], 2, "--socket-path"),
        (["teapot", "--socket-path", "x"], 2, "teapot"),
        (["edu", "--socket-path", "/nowhere/x"], 1, "/nowhere/x: No such file or directory\n"),
        (["edu", "--fd", "999"], 1, "--fd 999: Bad file descriptor\n"),
        (["edu", "--fd", "0"], 1, "--fd 0: Socket operation on non-socket\n"),
        (["edu", "--socket-path", "x", "--time-scale", "0"], 2, "--time-scale"),
        (["ioat", "--socket-path", "x", "--channels", "3"], 2, "--channels"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], status: int, words: str) -> None:
    done = run_model(*arguments)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_models_of_installed_plugins_by_name(tmp_path, monkeypatch) -> None:
    plugin = """
from vfu_server.device import ModelCommand
from vfu_server.hookspecs import hookimpl

VFU_SERVER_API = 1

@hookimpl
def vfu_server_probe(host, options):
    return None

@hookimpl
def vfu_server_models():
    return {"thing": ModelCommand("plugins.generic_dmaq.models", "an edu", ["edu"])}
"""
    site = install(tmp_path / "site", "somebody", {"somebodys_plugin": plugin})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(TREE)]))
    with (
        ModelProcess(tmp_path, "thing", module="vfu_server.model_server") as model,
        Client.connect(model.path) as client,
    ):
        client.negotiate()
        assert client.read(0, 0, 4) == 0x010000ED
    done = run_model("other", module="vfu_server.model_server")
    assert done.returncode == 2
    assert "there is no model 'other'; models:\n" in done.stderr
    assert "  thing        an edu\n" in done.stderr
