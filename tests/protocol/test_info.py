"""DEVICE_GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS and GET_IRQ_INFO: what was declared is what is told."""

import errno
import mmap
import os

import pytest

from tests.protocol.served import BAR0_SIZE, BAR2_SIZE, MAPPED
from vfu_server import uapi
from vfu_server.host_device import IrqInfo, MmapArea
from vfu_server.testing import ReplyError
from vfu_server.uapi import Command, RegionIndex


def test_the_device(client):
    info = client.get_info()
    assert (info.num_regions, info.num_irqs) == (9, 5)
    assert info.flags == uapi.DEVICE_FLAGS_PCI | uapi.DEVICE_FLAGS_RESET


@pytest.mark.parametrize("argsz", [0, 15])
def test_the_device_without_room_for_the_reply(client, argsz):
    with pytest.raises(ReplyError) as caught:
        client.call(Command.DEVICE_GET_INFO, uapi.DEVICE_INFO.pack(argsz, 0, 0, 0))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("argsz", [16, 17, 0xFFFFFFFF])
def test_more_room_than_needed_gives_no_longer_reply(client, argsz):
    reply = client.call(Command.DEVICE_GET_INFO, uapi.DEVICE_INFO.pack(argsz, 0, 0, 0))
    assert uapi.DEVICE_INFO.unpack(reply.payload)[0] == 16
    reply = client.call(Command.DEVICE_GET_IRQ_INFO, uapi.IRQ_INFO.pack(argsz, 0, 0, 0))
    assert uapi.IRQ_INFO.unpack(reply.payload)[0] == 16


@pytest.mark.parametrize(
    ("index", "size", "flags"),
    [(2, BAR2_SIZE, 3), (RegionIndex.CONFIG, 256, 3), (1, 0, 0), (RegionIndex.ROM, 0, 0), (RegionIndex.VGA, 0, 0)],
)
def test_regions_without_areas(client, index, size, flags):
    info = client.get_region_info(index)
    assert (info.index, info.size, info.flags, info.areas, info.fd) == (index, size, flags, (), -1)


def test_a_region_with_an_area_that_can_be_mapped(client):
    info = client.get_region_info(0)
    assert (info.size, info.areas) == (BAR0_SIZE, (MmapArea(MAPPED, 0x1000),))
    assert info.flags == 0xF
    with mmap.mmap(info.fd, 0x1000, offset=info.fd_offset + MAPPED) as area:
        area[:4] = b"here"
    os.close(info.fd)


def test_the_area_is_the_devices_memory(served, client):
    os.pwrite(served.bar0, b"device", MAPPED + 8)
    info = client.get_region_info(0)
    with mmap.mmap(info.fd, 0x1000, offset=info.fd_offset + MAPPED) as area:
        assert area[8:14] == b"device"
    os.close(info.fd)


@pytest.mark.parametrize("room", [32, 40, 63, 64, 4096])
def test_a_short_request_learns_how_much_room_is_needed(client, room):
    reply = client.call(
        Command.DEVICE_GET_REGION_INFO, uapi.REGION_INFO.pack(room, 0, 0, 0, 0, 0), room=room, reply_fds=1
    )
    argsz, flags, _, cap_offset, size, _ = uapi.REGION_INFO.unpack_from(reply.payload)
    reply.close_fds()
    assert (argsz, size) == (32 + 8 + 8 + 16, BAR0_SIZE)
    assert len(reply.payload) <= room
    # QEMU looks at cap_offset whenever the flag is set, even in a reply that was cut short
    assert not flags & uapi.REGION_INFO_FLAG_CAPS or 32 <= cap_offset <= argsz - 8
    assert bool(flags & uapi.REGION_INFO_FLAG_CAPS) or room < argsz


@pytest.mark.parametrize(("argsz", "index"), [(31, 0), (0, 0), (32, 9), (32, 0xFFFFFFFF)])
def test_regions_that_do_not_exist_and_requests_without_room(client, argsz, index):
    with pytest.raises(ReplyError) as caught:
        client.call(Command.DEVICE_GET_REGION_INFO, uapi.REGION_INFO.pack(argsz, 0, index, 0, 0, 0), reply_fds=1)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("index", range(9))
def test_no_region_has_io_fds(client, index):
    request = uapi.IRQ_INFO.pack(16, 0, index, 0)
    reply = client.wait_reply(client.send_message(Command.DEVICE_GET_REGION_IO_FDS, request))
    if index in (0, 2, RegionIndex.CONFIG):
        assert (reply.payload, reply.fds) == (request, ())
    else:
        assert reply.errno == errno.EINVAL


@pytest.mark.parametrize(("argsz", "flags", "index"), [(15, 0, 0), (16, 1, 0), (16, 0, 9), (16, 0, 0xFFFFFFFF)])
def test_io_fds_that_cannot_be_asked_for(client, argsz, flags, index):
    with pytest.raises(ReplyError) as caught:
        client.call(Command.DEVICE_GET_REGION_IO_FDS, uapi.IRQ_INFO.pack(argsz, flags, index, 0))
    assert caught.value.errno == errno.EINVAL


def test_interrupts_are_told_with_their_flags(client):
    assert [client.get_irq_info(index) for index in range(5)] == [
        IrqInfo(0, 1, uapi.IRQ_INFO_EVENTFD | uapi.IRQ_INFO_MASKABLE | uapi.IRQ_INFO_AUTOMASKED),
        IrqInfo(1, 4, uapi.IRQ_INFO_EVENTFD | uapi.IRQ_INFO_NORESIZE),
        IrqInfo(2, 32, uapi.IRQ_INFO_EVENTFD),
        IrqInfo(3, 0, 0),
        IrqInfo(4, 0, 0),
    ]


@pytest.mark.parametrize(("argsz", "index"), [(15, 0), (0, 0), (16, 5), (16, 0xFFFFFFFF)])
def test_interrupts_that_do_not_exist(client, argsz, index):
    with pytest.raises(ReplyError) as caught:
        client.call(Command.DEVICE_GET_IRQ_INFO, uapi.IRQ_INFO.pack(argsz, 0, index, 0))
    assert caught.value.errno == errno.EINVAL
