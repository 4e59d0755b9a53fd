"""Clients that go in the middle of what they have asked for: the next one finds a device as new, nothing is left."""

import os
import random
import select

import pytest

from tests.end_to_end.conftest import running
from tests.end_to_end.ioat_driver import IoatDriver
from tests.end_to_end.served import negotiated, until
from vfu_server import uapi
from vfu_server.testing import EduDriver, pci, save
from vfu_server.testing.edu import BUFFER, REG_LIVENESS
from vfu_server.uapi import Command, Feature, IrqIndex, MigState, RegionIndex


@pytest.fixture(scope="module")
def edu_server():
    """A transfer takes 10 ms: long enough to go in the middle of it."""
    with running("edu", scale=0.1) as server:
        yield server


def state_message(state):
    return Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(
        16, Feature.MIG_DEVICE_STATE | uapi.FEATURE_SET
    ) + uapi.FEATURE_STATE.pack(state, uapi.NO_DATA_FD)


def stop(guest, _):
    guest.client.send_message(*state_message(MigState.STOP))


def stop_copy(guest, _):
    guest.client.send_message(*state_message(MigState.STOP_COPY))
    guest.client.send_message(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(8 + 4096, 4096))


def resuming(guest, data):
    guest.client.send_message(*state_message(MigState.RESUMING))
    part = data[: len(data) // 2]
    guest.client.send_message(Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(8 + len(part), len(part)) + part)


def restore(guest, data):
    guest.client.send_message(*state_message(MigState.RESUMING))
    guest.client.send_message(Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(8 + len(data), len(data)) + data)
    guest.client.send_message(*state_message(MigState.RUNNING))


def reset(guest, _):
    guest.client.send_message(Command.DEVICE_RESET)


def function_level_reset(guest, _):
    at = pci.find_capability(guest.config, uapi.PCI_CAP_ID_EXP)
    payload = uapi.REGION_ACCESS.pack(at + 8, RegionIndex.CONFIG, 2) + b"\x00\x80"
    guest.client.send_message(Command.REGION_WRITE, payload)


def interrupts(guest, _):
    flags = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER
    guest.client.send_message(
        Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(20, flags, IrqIndex.INTX, 0, 1), guest.interrupts.fds
    )


def memory(guest, _):
    guest.client.send_message(Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(24, uapi.DMA_UNMAP_FLAG_ALL, 0, 0))
    guest.client.send_message(Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0x10_0000, 0x1000))
    guest.client.send_message(Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0x20_0000, 0x1000), [guest.memory.fd])


def features(guest, _):
    for feature in (Feature.MIG_DATA_SIZE, Feature.MIGRATION, Feature.MIG_DEVICE_STATE):
        guest.client.send_message(
            Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(4096, feature | uapi.FEATURE_GET) + bytes(64)
        )


def half_a_message(guest, _):
    guest.client.send_raw(uapi.HEADER.pack(1, Command.MIG_DATA_WRITE, 1 << 20, 0, 0) + bytes(1000), [guest.memory.fd])


def everything(guest, data):
    for ask in (interrupts, stop, stop_copy, memory, restore, features, reset):
        ask(guest, data)


ASKED = (stop, stop_copy, resuming, restore, reset, interrupts, memory, features, half_a_message, everything)


def state_of(server):
    """A whole state, for loads that are broken off."""
    with server.connect() as guest:
        guest.start().client.set_mig_state(MigState.STOP_COPY)
        return b"".join(save(guest.client))


def left(server):
    """What a server and its model hold while nobody is there."""
    until(lambda: server.model.control("state")["dma_maps"] == 0, "the last client's memory is still mapped")
    with negotiated(server.path) as client:
        client.get_info()
        return {
            "fds": server.fds(),
            "threads": server.threads(),
            "mappings": server.mappings(),
            "fds of the model": server.model.fds(),
        }


def same(server, before):
    """Nothing more is held than before; the event loop keeps a few idle threads for a while, with their stacks."""
    found = left(server)
    assert (found["fds"], found["fds of the model"]) == (before["fds"], before["fds of the model"])
    assert found["threads"] <= before["threads"] + 2
    assert found["mappings"] <= before["mappings"] + 16


def go(server, ask, seconds, data, begin):
    """A guest at work asks for something and goes `seconds` later."""
    with server.connect() as guest:
        begin(guest.start())
        ask(guest, data)
        select.select([], [], [], seconds)


def test_clients_of_edu_that_go_in_the_middle(edu_server):
    data = state_of(edu_server)
    chance = random.Random(4)

    def begin(guest):
        driver = EduDriver(guest)
        driver.write32(REG_LIVENESS, 0x1234)
        driver.begin_dma(0x1000, BUFFER, 4096, 0)

    go(edu_server, everything, 0.01, data, begin)
    before = left(edu_server)
    for ask in ASKED:
        for _ in range(2):
            go(edu_server, ask, chance.random() * 0.03, data, begin)
    with edu_server.connect() as guest:
        driver = EduDriver(guest.start())
        assert guest.client.mig_state() == MigState.RUNNING
        assert driver.read32(REG_LIVENESS) == 0
        driver.copy_from_device(0x2000, 4096)
        assert guest.memory.read(0x2000, 4096) == bytes(4096)
        assert driver.factorial(6) == 720
    same(edu_server, before)
    assert "Traceback" not in edu_server.said()


def test_clients_of_ioat_that_go_in_the_middle(ioat_source):
    data = state_of(ioat_source)
    chance = random.Random(5)

    def begin(guest):
        guest.enable_msix(2)
        driver = IoatDriver(guest)
        driver.set_up()
        driver.begin([(0x100000, 0x200000, 1 << 20)] * 8)

    go(ioat_source, everything, 0.01, data, begin)
    before = left(ioat_source)
    for ask in (*ASKED, function_level_reset):
        for _ in range(4):
            go(ioat_source, ask, chance.random() * 0.006, data, begin)
    with ioat_source.connect() as guest:
        guest.start().enable_msix(1)
        driver = IoatDriver(guest)
        driver.set_up()
        driver.copy([(0x100000, 0x200000, 4096)] * 3)
    same(ioat_source, before)
    assert "Traceback" not in ioat_source.said()


def test_sixty_whole_guests_leave_nothing_behind(ioat_source):
    """Fully negotiated, with memory, interrupts and a reset each; a thousand bare connections are in tests/protocol."""
    before = left(ioat_source)
    resident = ioat_source.resident()
    for _ in range(60):
        with ioat_source.connect() as guest:
            guest.start()
    same(ioat_source, before)
    assert ioat_source.resident() - resident < 2 << 20
    assert len(os.listdir(f"/proc/{ioat_source.model.process.pid}/task")) < 8
