"""The server as a process: clients that work, crowd, crash and attack, and what of them is left behind."""

import errno
import os
import socket
import time

import pytest

from tests.protocol.test_fds import WRONG
from vfu_server import uapi
from vfu_server.testing import Client, ConnectionClosedError, EduDriver, GuestMemory, ReplyError
from vfu_server.testing.edu import BUFFER, DMA_FROM_DEVICE
from vfu_server.uapi import Command, HeaderFlag


def test_a_guest_computes_and_copies(edu):
    driver = EduDriver(edu)
    assert driver.liveness(0x0F0F0F0F) == 0xF0F0F0F0
    assert driver.factorial(12) == 479001600
    edu.memory.write(0x10000, bytes(range(256)))
    driver.copy_to_device(0x10000, 256, at=0x100)
    driver.copy_from_device(0x20000, 256, at=0x100)
    assert edu.memory.read(0x20000, 256) == bytes(range(256))


@pytest.mark.parametrize("use", ["use_intx", "use_msi"])
def test_a_guest_works_by_interrupts(edu, use):
    driver = EduDriver(edu)
    getattr(driver, use)()
    assert [driver.factorial(n) for n in range(8)] == [1, 1, 2, 6, 24, 120, 720, 5040]
    edu.memory.write(0x1000, b"interrupt")
    driver.copy_to_device(0x1000, 9)
    driver.copy_from_device(0x3000, 9)
    assert edu.memory.read(0x3000, 9) == b"interrupt"


def test_memory_that_is_not_shared_is_reached_by_messages(edu_server):
    with GuestMemory() as memory:
        memory.add(0, 1 << 20, shared=False)
        with edu_server.connect(memory) as guest:
            driver = EduDriver(guest.start())
            memory.write(0x1000, b"by message")
            driver.copy_to_device(0x1000, 10)
            driver.copy_from_device(0x2000, 10)
            assert memory.read(0x2000, 10) == b"by message"
            assert (guest.client.dma_reads, guest.client.dma_writes) == (1, 1)


def test_posted_writes_reach_the_device_in_order(edu_server):
    with edu_server.connect(posted_writes=True) as guest:
        driver = EduDriver(guest.start())
        assert [driver.liveness(n) for n in range(50)] == [n ^ 0xFFFFFFFF for n in range(50)]
        assert driver.factorial(5) == 120


def test_a_second_client_is_refused_at_once(edu_server, edu):
    for _ in range(10):
        begun = time.monotonic()
        with Client.connect(edu_server.path) as second:
            with pytest.raises(ReplyError) as caught:
                second.negotiate()
            assert caught.value.errno == errno.EBUSY
            with pytest.raises(ConnectionClosedError):
                second.recv_message()
        assert time.monotonic() - begun < 4.5
    assert EduDriver(edu).factorial(4) == 24


def test_a_second_client_with_fds_leaves_none_behind(edu_server, edu):
    before = edu_server.fds()
    with open(os.devnull) as null:
        for _ in range(30):
            with Client.connect(edu_server.path) as second:
                second.send_message(Command.VERSION, bytes(4), [null.fileno()] * 8)
                assert second.recv_message().errno == errno.EBUSY
    assert EduDriver(edu).factorial(4) == 24
    edu_server.wait_fds(before)


def test_a_quick_reconnect_is_served(edu_server):
    for _ in range(3):
        with edu_server.connect() as guest:
            assert EduDriver(guest.start()).factorial(3) == 6
    with Client.connect(edu_server.path) as client:
        assert client.negotiate().max_msg_fds == 8


def test_a_thousand_connections_leave_nothing_behind(edu_server, edu):
    edu.close()
    for _ in range(50):
        Client.connect(edu_server.path).close()
    fds, threads, size = edu_server.idle()
    for n in range(1000):
        with Client.connect(edu_server.path) as client:
            client.send_raw(b"\1\0\1\0\x20\0\0\0"[: n % 9] or b"\0")
    again = edu_server.idle()
    assert again[:2] == (fds, threads)
    assert again[2] - size < 4 << 20


def test_thousands_of_bad_messages_with_fds_leave_nothing_behind(edu_server, edu):
    client = edu.client
    fd = os.memfd_create("attached")
    client.get_info()
    fds = edu_server.fds()
    size = edu_server.resident()
    for n in range(250):
        for command, payload in WRONG:
            client.send_message(command, payload, [fd] * (1 + n % 9), flags=HeaderFlag.NO_REPLY)
        client.get_info()
        assert edu_server.fds() <= fds + 1
    os.close(fd)
    client.dma_unmap(0x7000_0000, 0x1000)
    edu_server.wait_fds(fds)
    assert edu_server.resident() - size < 4 << 20


def test_a_flood_of_mistakes_does_not_flood_the_log(edu_server, edu):
    lines = len(edu_server.read_log())
    for n in range(2000):
        edu.client.write(0, 0x3000_0000 + n, 4, n, posted=True)
    edu.client.get_info()
    assert len(edu_server.read_log()) - lines < 20


def test_a_client_that_claims_the_world_gets_no_memory(edu_server):
    with Client.connect(edu_server.path) as client:
        client.negotiate({"max_data_xfer_size": -1, "max_msg_fds": 16})
        size = edu_server.resident()
        for count in (1 << 31, 0xFFFFFFFF, (1 << 20) + 1, 60 << 20):
            msg_id = client.send_message(Command.REGION_READ, uapi.REGION_ACCESS.pack(0, 0, count))
            assert client.wait_reply(msg_id).errno == errno.EINVAL
        assert edu_server.resident() - size < 2 << 20


def test_silent_connections_do_not_keep_others_out_for_long(edu_server):
    """Each would be given five seconds for its VERSION; the second is refused meanwhile, at once."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(edu_server.path)
        with Client.connect(edu_server.path) as client:
            with pytest.raises(ReplyError) as caught:
                client.negotiate()
            assert caught.value.errno == errno.EBUSY
    with Client.connect(edu_server.path) as client:
        assert client.negotiate().max_msg_fds == 8


def test_what_a_client_left_running_does_not_touch_its_memory_afterwards(slow_edu):
    driver = EduDriver(slow_edu)
    slow_edu.memory.write(0x1000, b"of the first client")
    driver.copy_to_device(0x1000, 19)
    driver.begin_dma(BUFFER, 0x2000, 19, DMA_FROM_DEVICE)
    with GuestMemory.of(1 << 20) as memory:
        slow_edu.client.close()
        with slow_edu.server.connect(memory) as guest:
            guest.client.negotiate()
            # whoever is served finds a device that does not reach the last client's memory any more
            slow_edu.memory.write(0x2000, bytes(19))
            guest.client.close()
        with slow_edu.server.connect(memory) as guest:
            EduDriver(guest.start()).finish_dma()
            assert memory.read(0, 1 << 20) == bytes(1 << 20)
        assert slow_edu.memory.read(0x2000, 19) == bytes(19)
