"""IrqState against the table of what vfio-pci does with SET_IRQS, row by row, and against its masking rules."""

import errno
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfu_server.errors import ClientError
from vfu_server.irq import IrqState
from vfu_server.uapi import IrqIndex

NONE, BOOL, EVENTFD = 1, 2, 4
MASK, UNMASK, TRIGGER = 8, 0x10, 0x20
INTX, MSI, MSIX, ERR, REQ = range(5)
COUNTS = {INTX: 1, MSI: 4, MSIX: 8, ERR: 1, REQ: 1}


class Client:
    """Keeps its own copies of the eventfds it gives away, and reads them."""

    def __init__(self, **counts) -> None:
        self.irq = IrqState(**{"intx": True, "msi": 4, "msix": 8, "express": True} | counts)
        self.fds: list[int] = []

    def eventfd(self) -> int:
        self.fds.append(os.eventfd(0, os.EFD_NONBLOCK))
        return len(self.fds) - 1

    def give(self, key: int) -> int:
        return os.dup(self.fds[key])

    def count(self, key: int) -> int:
        try:
            return os.eventfd_read(self.fds[key])
        except BlockingIOError:
            return 0

    def call(self, index: int, flags: int, start: int = 0, count: int = 1, bools: bytes = b"", keys=()) -> None:
        self.irq.set_irqs(index, flags, start, count, bools, [self.give(key) for key in keys])

    def arm(self, index: int, start: int = 0, count: int = 1) -> list[int]:
        keys = [self.eventfd() for _ in range(count)]
        self.call(index, EVENTFD | TRIGGER, start, count, keys=keys)
        return keys

    def errno(self, *args, **kwargs) -> int:
        """0 or the errno of a call."""
        try:
            self.call(*args, **kwargs)
        except ClientError as error:
            return error.errno
        return 0


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def client():
    before = open_fds()
    client = Client()
    yield client
    client.irq.release()
    for fd in client.fds:
        os.close(fd)
    assert open_fds() == before


# every combination of index, data and action, on an index that is on (armed) and on one that is off

ON = {
    (INTX, NONE, MASK): 0,
    (INTX, BOOL, MASK): 0,
    (INTX, EVENTFD, MASK): errno.ENOTTY,
    (INTX, NONE, UNMASK): 0,
    (INTX, BOOL, UNMASK): 0,
    (INTX, EVENTFD, UNMASK): 0,
} | {(index, data, TRIGGER): 0 for index in COUNTS for data in (NONE, BOOL, EVENTFD)}
OFF = {
    (ERR, BOOL, TRIGGER): 0,
    (REQ, BOOL, TRIGGER): 0,
    (INTX, NONE, MASK): errno.EINVAL,
    (INTX, BOOL, MASK): errno.EINVAL,
    (INTX, EVENTFD, MASK): errno.EINVAL,
    (INTX, NONE, UNMASK): errno.EINVAL,
    (INTX, BOOL, UNMASK): errno.EINVAL,
    (INTX, EVENTFD, UNMASK): errno.EINVAL,
    (INTX, NONE, TRIGGER): errno.EINVAL,
    (INTX, BOOL, TRIGGER): errno.EINVAL,
    (MSI, NONE, TRIGGER): errno.EINVAL,
    (MSI, BOOL, TRIGGER): errno.EINVAL,
    (MSIX, NONE, TRIGGER): errno.EINVAL,
    (MSIX, BOOL, TRIGGER): errno.EINVAL,
    (ERR, NONE, TRIGGER): errno.EINVAL,
    (REQ, NONE, TRIGGER): errno.EINVAL,
} | {(index, EVENTFD, TRIGGER): 0 for index in COUNTS}
COMBINATIONS = [(i, d, a) for i in COUNTS for d in (NONE, BOOL, EVENTFD) for a in (MASK, UNMASK, TRIGGER)]


@pytest.mark.parametrize(("index", "data", "action"), COMBINATIONS)
@pytest.mark.parametrize("on", [True, False])
def test_every_combination(client: Client, index: int, data: int, action: int, on: bool) -> None:
    if on:
        client.arm(index)
    wanted = (ON if on else OFF).get((index, data, action), errno.ENOTTY)
    keys = [client.eventfd()] if data == EVENTFD else []
    assert client.errno(index, data | action, 0, 1, b"\1", keys) == wanted


@pytest.mark.parametrize("index", COUNTS)
@pytest.mark.parametrize("data", [NONE, BOOL])
def test_software_trigger_fires_what_is_named(client: Client, index: int, data: int) -> None:
    count = COUNTS[index]
    keys = client.arm(index, 0, count)
    client.call(index, data | TRIGGER, 0, count, bytes(at % 2 for at in range(1, count + 1)))
    expected = [1 if data == NONE else at % 2 for at in range(1, count + 1)]
    assert [client.count(key) for key in keys] == expected
    client.call(index, data | TRIGGER, count - 1, 1, b"\0")
    assert client.count(keys[-1]) == (1 if data == NONE else 0)


@pytest.mark.parametrize("index", COUNTS)
def test_none_with_count_0_turns_off(client: Client, index: int) -> None:
    (key,) = client.arm(index)
    client.call(index, NONE | TRIGGER, 0, 0)
    assert not client.irq.signal(IrqIndex(index), 0)
    assert client.count(key) == 0
    assert client.errno(index, NONE | TRIGGER, 0, 0) == errno.EINVAL


@pytest.mark.parametrize("index", COUNTS)
def test_no_fds_disarm(client: Client, index: int) -> None:
    keys = client.arm(index, 0, COUNTS[index])
    last = COUNTS[index] - 1
    client.call(index, EVENTFD | TRIGGER, last, 1)
    assert not client.irq.signal(IrqIndex(index), last)
    assert client.irq.signal(IrqIndex(index), 0) == (last > 0)
    assert [client.count(key) for key in keys] == [int(at == 0 and last > 0) for at in range(last + 1)]
    assert client.irq.mode == (index if index <= MSIX else None)


@pytest.mark.parametrize("index", COUNTS)
def test_arming_again_swaps(client: Client, index: int) -> None:
    (old,) = client.arm(index)
    (new,) = client.arm(index)
    assert client.irq.signal(IrqIndex(index), 0)
    assert (client.count(old), client.count(new)) == (0, 1)


@pytest.mark.parametrize(
    ("index", "flags", "start", "count", "bools", "nfds", "wanted"),
    [
        (MSI, TRIGGER, 0, 1, b"", 0, errno.EINVAL),
        (MSI, NONE | BOOL | TRIGGER, 0, 1, b"\1", 0, errno.EINVAL),
        (MSI, NONE | EVENTFD | TRIGGER, 0, 1, b"", 1, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER | 0x40, 0, 1, b"", 1, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER | MASK, 0, 1, b"", 1, errno.ENOTTY),
        (MSI, EVENTFD, 0, 1, b"", 1, errno.ENOTTY),
        (MSI, NONE | TRIGGER, 4, 0, b"", 0, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER, 4, 1, b"", 1, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER, 3, 2, b"", 2, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER, 1, 0xFFFFFFFF, b"", 0, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER, 0, 2, b"", 1, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER, 0, 1, b"", 2, errno.EINVAL),
        (MSI, NONE | TRIGGER, 0, 1, b"", 1, errno.EINVAL),
        (MSI, BOOL | TRIGGER, 0, 2, b"\1", 0, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER, 0, 0, b"", 0, errno.ERANGE),
        (INTX, EVENTFD | TRIGGER, 0, 0, b"", 0, errno.EINVAL),
        (INTX, EVENTFD | TRIGGER, 1, 1, b"", 1, errno.EINVAL),
        (ERR, EVENTFD | TRIGGER, 0, 0, b"", 0, errno.EINVAL),
        (ERR, EVENTFD | TRIGGER, 0, 2, b"", 2, errno.EINVAL),
        (5, EVENTFD | TRIGGER, 0, 1, b"", 1, errno.EINVAL),
        (0xFFFFFFFF, EVENTFD | TRIGGER, 0, 1, b"", 1, errno.EINVAL),
    ],
)
def test_bad_arguments(client: Client, index, flags, start, count, bools, nfds, wanted) -> None:
    keys = [client.eventfd() for _ in range(nfds)]
    assert client.errno(index, flags, start, count, bools, keys) == wanted
    assert client.irq.mode is None


@pytest.mark.parametrize("counts", [{"intx": False}, {"msi": 0}, {"msix": 0}, {"express": False}])
def test_an_index_without_vectors_is_einval(counts: dict) -> None:
    client = Client(**counts)
    index = {"intx": INTX, "msi": MSI, "msix": MSIX, "express": ERR}[next(iter(counts))]
    assert client.errno(index, EVENTFD | TRIGGER, 0, 1, b"", [client.eventfd()]) == errno.EINVAL
    assert client.errno(index, NONE | TRIGGER, 0, 0) == errno.EINVAL
    os.close(client.fds[0])


@pytest.mark.parametrize("first", [INTX, MSI, MSIX])
@pytest.mark.parametrize("second", [INTX, MSI, MSIX])
def test_only_one_of_three_modes(client: Client, first: int, second: int) -> None:
    client.arm(first)
    result = client.errno(second, EVENTFD | TRIGGER, 0, 1, b"", [client.eventfd()])
    assert result == (0 if first == second else errno.EINVAL)
    assert client.irq.mode == first
    assert client.irq.messages_enabled == (first != INTX)
    client.arm(ERR)
    client.arm(REQ)


def test_vectors_are_allocated_by_the_first_call(client: Client) -> None:
    client.arm(MSIX, 1, 2)
    client.arm(MSIX, 0, 1)
    assert client.errno(MSIX, EVENTFD | TRIGGER, 3, 1, b"", [client.eventfd()]) == errno.EINVAL
    assert client.errno(MSIX, EVENTFD | TRIGGER, 3, 1) == 0
    assert [client.irq.message(vector) for vector in range(4)] == [True, True, True, False]
    client.call(MSIX, NONE | TRIGGER, 0, 0)
    client.arm(MSIX, 3, 1)
    assert client.irq.message(3)


def test_failed_arm_in_the_middle(client: Client) -> None:
    keys = client.arm(MSIX, 0, 3)
    fresh = client.eventfd()
    assert client.errno(MSIX, EVENTFD | TRIGGER, 1, 3, b"", [fresh, fresh, fresh]) == errno.EINVAL
    assert [client.irq.message(vector) for vector in range(4)] == [True, False, False, False]
    assert client.count(keys[0]) == 1
    assert client.irq.mode == MSIX


@pytest.mark.parametrize("index", COUNTS)
def test_what_is_no_eventfd_is_einval(client: Client, index: int) -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(ClientError) as caught:
        client.irq.set_irqs(index, EVENTFD | TRIGGER, 0, 1, b"", [write])
    assert caught.value.errno == errno.EINVAL
    assert client.irq.mode is None
    assert client.errno(index, EVENTFD | TRIGGER, 0, 1, b"", [client.eventfd()]) == 0


def test_a_full_eventfd_does_not_block(client: Client) -> None:
    fd = os.eventfd(0, 0)
    os.eventfd_write(fd, 0xFFFFFFFFFFFFFFFE)
    client.fds.append(fd)
    client.call(MSI, EVENTFD | TRIGGER, 0, 1, b"", [0])
    assert client.irq.message(0)
    assert os.eventfd_read(fd) == 0xFFFFFFFFFFFFFFFE


# INTx: masking, the line, the disable bit


def test_the_line_is_automasked_and_signalled_again_on_unmask(client: Client) -> None:
    (key,) = client.arm(INTX)
    client.irq.intx(True)
    client.irq.intx(True)
    assert client.count(key) == 1
    client.call(INTX, NONE | UNMASK)
    assert client.count(key) == 1
    client.irq.intx(False)
    client.call(INTX, BOOL | UNMASK, bools=b"\0")
    client.irq.intx(True)
    assert client.count(key) == 0
    client.call(INTX, BOOL | UNMASK, bools=b"\1")
    assert client.count(key) == 1
    client.irq.intx(False)
    client.call(INTX, NONE | UNMASK)
    assert client.count(key) == 0


@pytest.mark.parametrize("data", [NONE, BOOL])
def test_mask(client: Client, data: int) -> None:
    (key,) = client.arm(INTX)
    client.call(INTX, BOOL | MASK, bools=b"\0")
    client.irq.intx(True)
    assert client.count(key) == 1
    client.irq.intx(False)
    client.call(INTX, NONE | UNMASK)
    client.call(INTX, data | MASK, bools=b"\1")
    client.irq.intx(True)
    assert client.count(key) == 0
    client.call(INTX, NONE | TRIGGER)
    assert client.count(key) == 1


def test_arming_on_a_high_line_signals(client: Client) -> None:
    client.irq.intx(True)
    (key,) = client.arm(INTX)
    assert client.count(key) == 1
    (other,) = client.arm(INTX)
    assert client.count(other) == 0
    client.call(INTX, EVENTFD | TRIGGER)
    client.call(INTX, NONE | UNMASK)
    assert (client.count(key), client.count(other), client.irq.mode) == (0, 0, INTX)


def test_the_line_does_nothing_under_messages(client: Client) -> None:
    (key,) = client.arm(MSI)
    client.irq.intx(True)
    assert client.count(key) == 0
    assert client.irq.level
    client.call(MSI, NONE | TRIGGER, 0, 0)
    (key,) = client.arm(INTX)
    assert client.count(key) == 1


def test_disable_bit_masks_and_clearing_it_unmasks(client: Client) -> None:
    (key,) = client.arm(INTX)
    client.irq.set_intx_disabled(True)
    client.irq.intx(True)
    client.call(INTX, NONE | UNMASK)
    client.call(INTX, NONE | TRIGGER)
    assert client.count(key) == 0
    client.irq.set_intx_disabled(False)
    assert client.count(key) == 1
    client.irq.set_intx_disabled(False)
    assert client.count(key) == 0
    client.call(INTX, NONE | TRIGGER, 0, 0)
    client.irq.set_intx_disabled(True)
    (key,) = client.arm(INTX)
    assert client.count(key) == 0
    client.irq.set_intx_disabled(False)
    assert client.count(key) == 1


def test_resample(client: Client) -> None:
    (key,) = client.arm(INTX)
    unmask = client.eventfd()
    assert client.irq.resample_fd == -1
    client.call(INTX, EVENTFD | UNMASK, keys=[unmask])
    assert client.errno(INTX, EVENTFD | UNMASK, 0, 1, b"", [unmask]) == errno.EBUSY
    client.irq.intx(True)
    assert client.count(key) == 1
    client.irq.resample()
    assert client.count(key) == 0
    os.eventfd_write(client.fds[unmask], 3)
    client.irq.resample()
    client.irq.resample()
    assert (client.count(key), client.count(unmask)) == (1, 0)
    client.call(INTX, EVENTFD | UNMASK)
    assert client.irq.resample_fd == -1
    client.irq.resample()
    os.eventfd_write(client.fds[unmask], 1)
    client.call(INTX, EVENTFD | UNMASK, keys=[unmask])
    assert client.count(key) == 1
    client.call(INTX, NONE | TRIGGER, 0, 0)
    assert client.irq.resample_fd == -1


def test_infos() -> None:
    infos = IrqState(intx=True, msi=1, msix=2, express=False).infos
    assert [(info.index, info.count, info.flags) for info in infos] == [
        (0, 1, 1 | 2 | 4),
        (1, 1, 1 | 8),
        (2, 2, 1 | 8),
        (3, 0, 1 | 8),
        (4, 1, 1 | 8),
    ]


# messages


def message(index: int, flags: int, start: int, count: int, tail: bytes = b"", argsz: int | None = None) -> bytes:
    return struct.pack("<IIIII", 20 + len(tail) if argsz is None else argsz, flags, index, start, count) + tail


def test_messages(client: Client) -> None:
    key = client.eventfd()
    client.irq.handle(message(MSI, EVENTFD | TRIGGER, 0, 1), [client.give(key)])
    client.irq.handle(message(MSI, BOOL | TRIGGER, 0, 1, b"\1"), [])
    assert client.count(key) == 1
    bad = [
        b"",
        message(MSI, EVENTFD | TRIGGER, 0, 1)[:19],
        message(MSI, EVENTFD | TRIGGER, 0, 1, argsz=19),
        message(MSI, BOOL | TRIGGER, 0, 1, b"\1", argsz=20),
        message(MSI, BOOL | TRIGGER, 0, 1, b"", argsz=21),
    ]
    for payload in bad:
        with pytest.raises(ClientError) as caught:
            client.irq.handle(payload, [client.give(key)] if payload[4:5] == b"\x24" else [])
        assert caught.value.errno == errno.EINVAL


def test_release_closes_everything(client: Client) -> None:
    before = open_fds()
    client.arm(MSIX, 0, 8)
    client.arm(ERR)
    client.arm(REQ)
    client.irq.intx(True)
    client.irq.release()
    assert open_fds() == before + 10
    assert client.irq.mode is None
    assert client.irq.level
    assert not client.irq.signal(IrqIndex.ERR, 0)
    client.irq.release()


@settings(max_examples=150, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.integers(0, 6),
            st.one_of(st.sampled_from([0x21, 0x22, 0x24, 9, 0xA, 0x11, 0x12, 0x14, 0xC]), st.integers(0, 0xFF)),
            st.integers(0, 9),
            st.integers(0, 9),
            st.binary(max_size=9),
            st.integers(0, 9),
        ),
        max_size=12,
    )
)
def test_no_sequence_loses_an_fd_or_breaks(calls) -> None:
    before = open_fds()
    client = Client()
    for index, flags, start, count, bools, nfds in calls:
        held = [client.eventfd()] if nfds else []
        result = client.errno(index, flags, start, count, bools, held * nfds)
        assert result in (0, errno.EINVAL, errno.ENOTTY, errno.EBUSY, errno.ERANGE)
        client.irq.intx(bool(flags & 1))
    client.irq.release()
    for fd in client.fds:
        os.close(fd)
    assert open_fds() == before
