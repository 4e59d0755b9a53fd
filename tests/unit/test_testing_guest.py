"""The shipped guest: what a VMM sends at start and in which order, its accesses, interrupts and memory."""

import errno
import os
import socket

import pytest

from tests.unit.peer_device import BAR0_SIZE, BAR2_SIZE, BAR4_SIZE, MAPPED, REG_KEPT, REG_SIGNAL, PeerDevice
from vfu_server import uapi
from vfu_server.errors import DeadlineError, VfuServerError
from vfu_server.testing import Client, Guest, GuestMemory, pci
from vfu_server.uapi import Command, IrqIndex


@pytest.fixture
def guest():
    ours, theirs = socket.socketpair()
    device = PeerDevice(theirs)
    with Guest(Client(ours)) as guest:
        guest.device = device
        yield guest
    device.close()


def test_start_follows_the_order_of_qemu(guest):
    guest.start()
    commands = [
        command for command, _ in guest.device.log if command not in (Command.REGION_READ, Command.REGION_WRITE)
    ]
    assert commands == [
        Command.VERSION,
        Command.DMA_MAP,
        Command.DEVICE_GET_INFO,
        *[Command.DEVICE_GET_REGION_INFO] * 8,
        *[Command.DEVICE_GET_IRQ_INFO] * 4,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_RESET,
        Command.DEVICE_SET_IRQS,
    ]
    details = guest.device.log
    assert [d for c, d in details if c == Command.DEVICE_GET_REGION_INFO] == [0, 0, 1, 2, 3, 4, 5, 7]
    assert [d for c, d in details if c == Command.DEVICE_SET_IRQS] == [
        (IrqIndex.INTX, 0x24, 0, 1, 1),
        (IrqIndex.ERR, 0x24, 0, 1, 1),
        (IrqIndex.INTX, 0x21, 0, 0, 0),
        (IrqIndex.INTX, 0x24, 0, 1, 1),
    ]
    assert (Command.REGION_READ, (7, 0, 256)) in details


def test_firmware_sizes_and_places_the_bars(guest):
    guest.start()
    assert guest.bars == [
        pci.BarInfo(0, BAR0_SIZE),
        pci.BarInfo(2, BAR2_SIZE, wide=True, prefetchable=True),
        pci.BarInfo(4, BAR4_SIZE, io=True),
    ]
    assert guest.addresses == {2: 0xE0000000, 0: 0xE0010000, 4: 0xC000}
    for bar in guest.bars:
        assert pci.read_bar(guest.config, bar) == guest.addresses[bar.index]
    assert guest.config.read(uapi.PCI_COMMAND, 2) == 0x7


def test_accesses_of_a_mapped_area_are_no_messages(guest):
    guest.start()
    seen = len(guest.device.log)
    for width, value in ((1, 0x11), (2, 0x2222), (4, 0x33333333), (8, 0x4444444444444444)):
        guest.write(0, MAPPED + 8 * width, width, value)
        assert guest.read(0, MAPPED + 8 * width, width) == value
    assert len(guest.device.log) == seen
    guest.write(0, REG_KEPT, 4, 77)
    assert guest.read(0, REG_KEPT, 4) == 77
    assert len(guest.device.log) == seen + 2


def test_without_mapping_all_accesses_are_messages_and_writes_may_be_posted():
    ours, theirs = socket.socketpair()
    device = PeerDevice(theirs)
    with Guest(Client(ours), map_regions=False, posted_writes=True) as guest:
        guest.start()
        guest.write(0, MAPPED, 4, 5)
        assert guest.read(0, MAPPED, 4) == 5
        assert device.log[-2:] == [(Command.REGION_WRITE, (0, MAPPED, 4)), (Command.REGION_READ, (0, MAPPED, 4))]
    device.close()


@pytest.mark.parametrize(("enable", "index"), [("enable_msi", IrqIndex.MSI), ("enable_msix", IrqIndex.MSIX)])
def test_a_driver_switches_from_the_pin_to_messages(guest, enable, index):
    guest.start()
    interrupts = getattr(guest, enable)(4)
    assert [d for c, d in guest.device.log if c == Command.DEVICE_SET_IRQS][-2:] == [
        (IrqIndex.INTX, 0x21, 0, 0, 0),
        (index, 0x24, 0, 4, 4),
    ]
    guest.write(0, REG_SIGNAL, 4, 2)
    guest.write(0, REG_SIGNAL, 4, 2)
    guest.read(0, REG_KEPT, 4)
    assert interrupts.wait(2) == 2
    assert interrupts.counts() == (0, 0, 0, 0)
    interrupts.disarm_vector(2)
    guest.write(0, REG_SIGNAL, 4, 2)
    with pytest.raises(DeadlineError, match="vector 2"):
        interrupts.wait(2, 0.02)
    interrupts.arm_vector(2)
    guest.write(0, REG_SIGNAL, 4, 2)
    assert interrupts.wait(2) == 1


def test_the_pin_is_waited_for_and_unmasked(guest):
    guest.start()
    guest.write(0, REG_SIGNAL, 4, 0)
    assert guest.interrupts.wait() == 1
    guest.interrupts.unmask()
    guest.interrupts.mask()
    assert [d[:2] for c, d in guest.device.log if c == Command.DEVICE_SET_IRQS][-2:] == [(0, 0x11), (0, 0x9)]


def test_a_device_without_reset_is_not_reset():
    ours, theirs = socket.socketpair()
    device = PeerDevice(theirs, resets=False)
    with Guest(Client(ours)) as guest:
        guest.start()
    assert (Command.DEVICE_RESET, 0) not in device.log
    device.close()


def test_a_capability_that_is_not_there_is_named(guest):
    guest.start()
    guest.device.config[uapi.PCI_CAPABILITY_LIST] = 0
    with pytest.raises(VfuServerError, match="capability 0x5"):
        guest.enable_msi()


def test_no_fd_is_left_behind():
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    device = PeerDevice(theirs)
    with Guest(Client(ours)) as guest:
        guest.start()
        guest.enable_msix()
    device.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_capability_list_without_end_is_refused(guest):
    guest.start()
    guest.device.config[0x71] = 0x50
    with pytest.raises(pci.BrokenConfigError):
        pci.capabilities(guest.config)
    guest.device.config[0x71] = 0x20
    with pytest.raises(pci.BrokenConfigError):
        pci.capabilities(guest.config)


def test_memory_is_read_and_written_across_adjacent_blocks():
    with GuestMemory() as memory:
        memory.add(0x1000, 0x1000)
        memory.add(0x2000, 0x1000, prot=uapi.DMA_FLAG_READ)
        memory.write(0x1FFC, b"abcdefgh")
        assert memory.read(0x1FFC, 8) == b"abcdefgh"
        assert memory.dma_read(0x1FFC, 8) == b"abcdefgh"
        with pytest.raises(OSError, match="does not allow") as caught:
            memory.dma_write(0x1FFC, b"ABCDEFGH")
        assert caught.value.errno == errno.EPERM
        with pytest.raises(OSError, match="no guest memory at 0x3000") as caught:
            memory.write(0x2FFC, b"abcdefgh")
        assert caught.value.errno == errno.EFAULT
        assert memory.read(0x2FFC, 4) == bytes(4)
        assert os.pread(memory.fd, 8, 0xFFC) == b"abcdefgh"


def test_a_write_only_block_cannot_be_read_by_the_device():
    with GuestMemory() as memory:
        memory.add(0, 0x1000, prot=uapi.DMA_FLAG_WRITE)
        with pytest.raises(OSError, match="does not allow"):
            memory.dma_read(0, 1)


@pytest.mark.parametrize("block", [(0x800, 0x1000), (0, 0x800), (0, 0), (0x1000, 0x3000)])
def test_blocks_are_whole_pages_and_lie_apart(block):
    with GuestMemory() as memory:
        memory.add(0x2000, 0x1000)
        with pytest.raises(ValueError, match="0x"):
            memory.add(*block)


def test_blocks_are_mapped_with_their_offset_or_without_fd(guest):
    with GuestMemory() as memory:
        memory.add(0x10000, 0x2000)
        memory.add(0x40000, 0x1000, prot=uapi.DMA_FLAG_READ)
        memory.add(0x20000, 0x1000, shared=False)
        memory.map_into(guest.client)
        assert [d for c, d in guest.device.log if c == Command.DMA_MAP] == [
            (0x10000, 0x2000, 3, 0, 1),
            (0x20000, 0x1000, 3, 0, 0),
            (0x40000, 0x1000, 1, 0x2000, 1),
        ]
        memory.unmap_from(guest.client)
        assert not guest.device.maps
