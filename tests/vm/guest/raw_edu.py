"""Checks in the test machine that kernel VFIO drives edu, without the product: `raw_edu.py group|cdev [model]`.

With `model` the device is ours, plugged in with vfio-user-pci. What fails here is the machine's fault, not the
server's.
"""

import errno
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.raw_vfio import CdevDevice, GroupDevice, RawDevice, wait_eventfd

IDENTIFICATION, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, IRQ_ACK = 0x00, 0x04, 0x08, 0x20, 0x24, 0x64
DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
RUN, FROM_DEVICE, INTERRUPT = 1, 2, 4
BUFFER = 0x40000
WANT_INTERRUPT = 0x80
IOVA, UNMAPPED = 0x200000, 0x7654000
PATTERN = bytes(range(256)) * 16

BDF = pci.only(pci.EDU)
DOOR = {"group": GroupDevice, "cdev": CdevDevice}[sys.argv[1]]
MODEL = "model" in sys.argv


@contextmanager
def opened() -> Iterator[RawDevice]:
    with DOOR(BDF) as device:
        device.enable()
        yield device


def transfer(device: RawDevice, source: int, destination: int, command: int) -> None:
    """One DMA of the whole pattern, waited for."""
    for register, value in ((DMA_SOURCE, source), (DMA_DESTINATION, destination), (DMA_COUNT, len(PATTERN))):
        device.write(0, register, 8, value)
    device.write(0, DMA_COMMAND, 8, RUN | command)
    deadline = time.monotonic() + 60
    while device.read(0, DMA_COMMAND, 8) & RUN:
        if time.monotonic() > deadline:
            raise AssertionError("the device did not finish its DMA")


def wait_fault(log: KernelLog, kind: str, address: int) -> None:
    """The IOMMU's driver told of the access. A device from outside has no mapping that it could be made through."""
    if not MODEL:
        log.wait(rf"DMAR:.*DMA {kind}.*{BDF[5:]}.*fault addr {address:#x}")


def check_bind() -> None:
    pci.bind(BDF)
    equal(pci.group_members(BDF), [BDF], "members of the group")


def check_registers() -> None:
    with opened() as device:
        flags, regions, irqs = device.info()
        equal((flags & 2, regions, irqs), (2, 9, 5), "PCI device, regions, interrupt indexes")
        equal(device.region(0)[0], 1 << 20, "size of BAR 0")
        equal(device.read(0, IDENTIFICATION, 4), 0x010000ED, "identification")
        device.write(0, LIVENESS, 4, 0x12345678)
        equal(device.read(0, LIVENESS, 4), 0xEDCBA987, "liveness")


def check_mapped_registers() -> None:
    with opened() as device:
        registers = device.map_region(0)
        equal(int.from_bytes(registers[0:4], "little"), 0x010000ED, "identification")
        registers.close()


def check_factorial_interrupts() -> None:
    with opened() as device:
        equal(device.irq_count(1), 1, "MSI vectors")
        eventfd = device.arm_msi()
        device.write(0, STATUS, 4, WANT_INTERRUPT)
        device.write(0, FACTORIAL, 4, 10)
        equal(wait_eventfd(eventfd), 1, "interrupts")
        equal(device.read(0, FACTORIAL, 4), 3628800, "10!")
        equal(device.read(0, IRQ_STATUS, 4), 1, "interrupt status")
        device.write(0, IRQ_ACK, 4, 1)
        os.close(eventfd)


def check_dma_both_ways() -> None:
    with opened() as device:
        memory = mmap.mmap(-1, 2 * len(PATTERN))
        memory[: len(PATTERN)] = PATTERN
        device.map(memory, IOVA)
        eventfd = device.arm_msi()
        transfer(device, IOVA, BUFFER, INTERRUPT)
        wait_eventfd(eventfd)
        device.write(0, IRQ_ACK, 4, 0x100)
        transfer(device, BUFFER, IOVA + len(PATTERN), FROM_DEVICE)
        equal(memory[len(PATTERN) :], PATTERN, "what came back")
        device.unmap(IOVA, len(memory))
        os.close(eventfd)


def check_unmapped_dma_faults() -> None:
    with opened() as device:
        log = KernelLog()
        transfer(device, BUFFER, UNMAPPED, FROM_DEVICE)
        wait_fault(log, "Write", UNMAPPED)
        transfer(device, UNMAPPED, BUFFER, 0)
        wait_fault(log, "Read", UNMAPPED)
        log.close()
        equal(device.read(0, IDENTIFICATION, 4), 0x010000ED, "identification after the faults")


def check_memory_is_gone_after_unmap() -> None:
    with opened() as device:
        memory = mmap.mmap(-1, len(PATTERN))
        device.map(memory, IOVA)
        device.unmap(IOVA, len(memory))
        log = KernelLog()
        transfer(device, BUFFER, IOVA, FROM_DEVICE)
        wait_fault(log, "Write", IOVA)
        log.close()
        equal(bytes(memory), bytes(len(PATTERN)), "memory that was unmapped")


def check_reset() -> None:
    with opened() as device:
        try:
            device.reset()
        except OSError as error:
            equal(error.errno, errno.EINVAL, "errno of a reset that the function does not have")
        else:
            raise AssertionError("a function without any way to be reset was reset")


def check_rebind() -> None:
    pci.unbind(BDF)
    equal(pci.driver(BDF), "", "driver")
    pci.bind(BDF)
    check_registers()


checks.run(globals())
