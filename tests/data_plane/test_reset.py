"""Resets in every state, and clients that go in the middle of anything: the device runs again and nothing is left."""

import os
import struct
import threading

import pytest

from tests.data_plane.rig import BDF, OTHER, PAGE, WAYS, Plugin, memory, rig, until
from tests.data_plane.sources import sourced
from tests.host.fake_function import CONFIG
from tests.plugins_synthetic.device import MAGIC, REG_MAGIC
from vfu_server import uapi
from vfu_server.testing import ReplyError
from vfu_server.uapi import Command, Feature, HeaderFlag, IrqIndex, MigState, RegionIndex

EXP_AT = 0x40
DEVCTL = EXP_AT + 8
FLR = 0x8000
FROM_RUNNING = {
    MigState.RUNNING: (),
    MigState.RUNNING_P2P: (MigState.RUNNING_P2P,),
    MigState.PRE_COPY: (MigState.PRE_COPY,),
    MigState.PRE_COPY_P2P: (MigState.PRE_COPY_P2P,),
    MigState.STOP: (MigState.STOP,),
    MigState.STOP_COPY: (MigState.STOP_COPY,),
    MigState.RESUMING: (MigState.RESUMING,),
}


def with_flr(kernel):
    """Its functions have a PCIe capability that offers FLR."""
    for function in kernel.functions.values():
        config = function.memory[CONFIG]
        config[uapi.PCI_STATUS] |= uapi.PCI_STATUS_CAP_LIST
        config[uapi.PCI_CAPABILITY_LIST] = EXP_AT
        config[EXP_AT : EXP_AT + 8] = struct.pack("<BBHI", uapi.PCI_CAP_ID_EXP, 0, 2, 1 << 28)


def by_message(client):
    client.reset()


def by_config(client):
    client.write(RegionIndex.CONFIG, DEVCTL, 2, FLR)


def resets(made):
    return made.function.calls.count("reset")


def works(client):
    assert client.mig_state() == MigState.RUNNING
    assert client.read(0, REG_MAGIC, 4) == MAGIC


def go_to(client, state):
    for step in FROM_RUNNING[state]:
        client.set_mig_state(step)


@pytest.fixture(params=WAYS)
def served(request, tmp_path):
    with rig(tmp_path, request.param, prepare=with_flr, p2p=True, pre_copy=True) as made:
        yield made


# --- resets


@pytest.mark.parametrize("reset", [by_message, by_config])
@pytest.mark.parametrize("state", FROM_RUNNING, ids=lambda state: state.name)
def test_in_every_state(served, state, reset):
    with memory(4 * PAGE) as guest, served.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        go_to(client, state)
        before = resets(served)
        reset(client)
        assert resets(served) == before + 1
        works(client)
        assert len(served.space.maps) == 1, "a reset leaves memory mapped"
        client.set_mig_state(MigState.STOP)
        client.set_mig_state(MigState.RUNNING)
        works(client)


@pytest.mark.parametrize("reset", [by_message, by_config])
def test_in_the_state_error(served, reset):
    with served.connect() as client:
        client.set_mig_state(MigState.STOP)
        served.function.resets = False
        with pytest.raises(ReplyError):
            reset(client)
        assert client.mig_state() == MigState.ERROR
        served.function.resets = True
        reset(client)
        works(client)


def test_other_writes_of_that_register_reset_nothing(served):
    with served.connect() as client:
        before = resets(served)
        client.write(RegionIndex.CONFIG, DEVCTL, 2, FLR - 1)
        client.write(RegionIndex.CONFIG, DEVCTL, 1, 0x80)
        assert resets(served) == before


# --- clients that go


def send_half(client):
    client.sock.sendall(uapi.HEADER.pack(1, Command.DMA_MAP, 64, 0, 0) + bytes(7))


def send_only(command, payload=b""):
    def send(client):
        client.send_message(command, payload)

    return send


def feature(flags, data=b""):
    return uapi.DEVICE_FEATURE.pack(uapi.DEVICE_FEATURE.size + len(data), flags) + data


def set_state(state):
    return send_only(
        Command.DEVICE_FEATURE,
        feature(uapi.FEATURE_SET | Feature.MIG_DEVICE_STATE, uapi.FEATURE_STATE.pack(state, -1)),
    )


def reading(state):
    def send(client):
        client.set_mig_state(state)
        client.send_message(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(8 + (1 << 20), 1 << 20))

    return send


def writing(client):
    client.set_mig_state(MigState.RESUMING)
    client.send_message(Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(8 + 64, 64) + bytes(64))


def logging(client):
    client.dma_logging_start([(0, 1 << 32)])
    data = uapi.FEATURE_LOGGING_REPORT.pack(0, 1 << 20, PAGE)
    size = uapi.DEVICE_FEATURE.size + len(data) + 32
    head = uapi.DEVICE_FEATURE.pack(size, uapi.FEATURE_GET | Feature.DMA_LOGGING_REPORT)
    client.send_message(Command.DEVICE_FEATURE, head + data)


def many(client):
    """A heap of ordered messages, of which most are held when the end comes."""
    for _ in range(50):
        set_state(MigState.STOP)(client)
        client.send_message(Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(uapi.DMA_UNMAP.size, 0, 0, PAGE))
        set_state(MigState.RUNNING)(client)
        client.send_message(
            Command.REGION_WRITE, uapi.REGION_ACCESS.pack(0, 0, 4) + bytes(4), flags=HeaderFlag.NO_REPLY
        )


MIDDLES = {
    "nothing": lambda client: None,
    "half a message": send_half,
    "a reset": send_only(Command.DEVICE_RESET),
    "FLR": send_only(Command.REGION_WRITE, uapi.REGION_ACCESS.pack(DEVCTL, RegionIndex.CONFIG, 2) + b"\x00\x80"),
    "a stop": set_state(MigState.STOP),
    "a stop-copy": set_state(MigState.STOP_COPY),
    "a read in pre-copy": reading(MigState.PRE_COPY),
    "a read in stop-copy": reading(MigState.STOP_COPY),
    "a load": writing,
    "a report": logging,
    "many messages": many,
}


def files():
    """What the process has open, but for what each test's own listing adds."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["device", "iommu"])
@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_a_client_that_goes_in_the_middle(tmp_path, kind, middle):
    eventfd = os.eventfd(0, os.EFD_CLOEXEC)
    with (
        memory(16 * PAGE) as guest,
        sourced(tmp_path, kind, p2p=True, pre_copy=True, size=8 << 20) as (made, source),
    ):
        with made.connect() as client:  # the first one opens what stays open
            works(client)
        with made.connect() as client:
            works(client)
            before, threads = files(), threading.active_count()
        for _ in range(3):
            with made.connect() as client:
                client.dma_map(0, 16 * PAGE, fd=guest)
                client.dma_map(1 << 30, PAGE)
                client.dma_unmap(1 << 30, PAGE)
                client.set_irq_eventfds(IrqIndex.MSI, 0, [eventfd])
                middle(client)
            with made.connect() as client:
                works(client)
                assert made.space.maps == []
                assert made.function.mode is None, "interrupts are off"
                assert not source.running
                assert client.feature_probe(Feature.DMA_LOGGING_START, uapi.FEATURE_SET)
                until(lambda: files() <= before, "fds are left")
        assert threading.active_count() <= threads + 1
        assert made.session.refused == ""
    os.close(eventfd)


class Stuck(Plugin):
    """A device whose reset waits for leave."""

    leave = threading.Event()
    waiting = threading.Event()

    async def reset(self):
        import trio

        self.waiting.set()
        await trio.to_thread.run_sync(self.leave.wait, 5)
        await super().reset()


def test_a_client_that_goes_while_the_device_is_reset(tmp_path):
    Stuck.leave.clear()
    Stuck.waiting.clear()
    with rig(tmp_path, "group", plugin=Stuck) as made:
        client = made.connect()
        client.send_message(Command.DEVICE_RESET)
        assert Stuck.waiting.wait(5)
        client.close()
        Stuck.leave.set()
        with made.connect() as following:
            works(following)


# --- devices that go


@pytest.mark.parametrize("way", WAYS)
def test_a_device_that_is_gone_ends_its_own_nursery_only(tmp_path, way):
    with memory(4 * PAGE) as guest, rig(tmp_path, way, bdfs=(BDF, OTHER)) as made:
        with made.connect() as client, made.connect(OTHER) as other:
            client.dma_map(0, 4 * PAGE, fd=guest)
            other.dma_map(0, 4 * PAGE, fd=guest)
            lost, kept = made.served[BDF], made.served[OTHER]
            lost.function.dead = True
            lost.function.signal(IrqIndex.ERR)
            until(lambda: lost.session.mig_state is MigState.ERROR)
            client.dma_unmap(0, 4 * PAGE)  # its client is served on: it has to survive
            client.dma_map(0, 4 * PAGE, fd=guest)
            with pytest.raises(ReplyError) as caught:
                client.read(0, REG_MAGIC, 4)
            assert caught.value.errno
            works(other)
        assert lost.ended.wait(5)
        assert "gone" in str(lost.lost)
        assert not kept.ended.is_set()
        with made.connect(OTHER) as again:
            works(again)
        assert kept.lost is None


def test_a_device_that_goes_without_a_client_ends_at_once(tmp_path):
    with rig(tmp_path, "cdev", bdfs=(BDF, OTHER)) as made:
        lost = made.served[BDF]
        lost.function.dead = True
        lost.function.signal(IrqIndex.ERR)
        assert lost.ended.wait(5)
        with made.connect(OTHER) as other:
            works(other)
