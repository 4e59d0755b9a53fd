"""DEVICE_SET_IRQS against the whole server: the kernel's rules and errnos, and interrupts that really come."""

import os

import pytest

from vfu_server import uapi
from vfu_server.testing import EduDriver, Interrupts, ReplyError
from vfu_server.testing.edu import IRQ_FACTORIAL, REG_IRQ_ACK, REG_IRQ_STATUS
from vfu_server.uapi import IrqIndex

INTX, MSI, MSIX, ERR = IrqIndex.INTX, IrqIndex.MSI, IrqIndex.MSIX, IrqIndex.ERR
NONE, BOOL, EVENTFD = uapi.IRQ_SET_DATA_NONE, uapi.IRQ_SET_DATA_BOOL, uapi.IRQ_SET_DATA_EVENTFD
MASK, UNMASK, TRIGGER = uapi.IRQ_SET_ACTION_MASK, uapi.IRQ_SET_ACTION_UNMASK, uapi.IRQ_SET_ACTION_TRIGGER


@pytest.fixture
def eventfds():
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    yield fds
    for fd in fds:
        os.close(fd)


def test_the_pin_is_masked_by_its_interrupt_until_the_guest_unmasks_it(edu):
    driver, pin = EduDriver(edu), edu.interrupts
    driver.raise_interrupt(2)
    assert pin.wait() == 1
    driver.raise_interrupt(4)
    assert driver.read32(REG_IRQ_STATUS) == 6
    assert pin.count() == 0
    pin.unmask()
    assert pin.wait() == 1, "the line is still up"
    driver.write32(REG_IRQ_ACK, 6)
    pin.unmask()
    assert driver.read32(REG_IRQ_STATUS) == 0
    assert pin.count() == 0
    pin.mask()
    driver.raise_interrupt(1)
    assert driver.read32(REG_IRQ_STATUS) == 1
    assert pin.count() == 0
    pin.unmask()
    assert pin.wait() == 1


def test_eventfds_are_swapped_disarmed_and_fired_by_the_client(edu, eventfds):
    client, driver = edu.client, EduDriver(edu)
    client.set_irq_eventfds(INTX, 0, eventfds[:1])
    client.trigger_irqs(INTX, 0, [True])
    client.trigger_irqs(INTX, 0, [False])
    client.set_irqs(INTX, NONE | TRIGGER, 0, 1)
    assert client.wait_readable(eventfds[0])
    assert os.eventfd_read(eventfds[0]) == 2
    assert edu.interrupts.count() == 0
    client.disarm_irqs(INTX, 0, 1)
    driver.raise_interrupt(IRQ_FACTORIAL)
    driver.write32(REG_IRQ_ACK, IRQ_FACTORIAL)
    assert not client.wait_readable(eventfds[0], 0.02)
    edu.interrupts.arm()
    client.unmask_irq(INTX)
    driver.raise_interrupt(IRQ_FACTORIAL)
    assert edu.interrupts.wait() == 1


def test_messages_come_once_each_and_need_the_pin_off(edu):
    driver = EduDriver(edu)
    messages = edu.enable_msi()
    for count in range(1, 4):
        driver.raise_interrupt(1)
        assert messages.wait() == 1, count
    messages.disarm_vector(0)
    driver.raise_interrupt(1)
    driver.read32(REG_IRQ_STATUS)
    assert messages.count() == 0
    messages.arm_vector(0)
    driver.raise_interrupt(1)
    assert messages.wait() == 1
    with Interrupts(edu.client, INTX) as pin, pytest.raises(ReplyError):
        pin.arm()
    edu.disable_interrupts()
    edu.enable_intx()


def test_an_eventfd_of_the_last_client_is_let_go(edu_server):
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    with edu_server.connect() as guest:
        guest.start()
        before = edu_server.fds()
        guest.enable_msi()
        guest.client.set_irq_eventfds(MSI, 0, guest.interrupts.fds)
        assert edu_server.fds() <= before + 1
    with edu_server.connect() as guest:
        guest.start()
        assert edu_server.fds() == before
    os.close(read_end)
    os.close(write_end)
