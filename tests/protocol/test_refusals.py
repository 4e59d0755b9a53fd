"""What the whole server refuses of SET_IRQS and DEVICE_FEATURE: with the errnos of the kernel, as users expect."""

import errno
import os

import pytest

from vfu_server import uapi
from vfu_server.testing import ReplyError
from vfu_server.uapi import Command, Feature, IrqIndex, MigState

INTX, MSI, MSIX, ERR = IrqIndex.INTX, IrqIndex.MSI, IrqIndex.MSIX, IrqIndex.ERR
NONE, BOOL, EVENTFD = uapi.IRQ_SET_DATA_NONE, uapi.IRQ_SET_DATA_BOOL, uapi.IRQ_SET_DATA_EVENTFD
MASK, UNMASK, TRIGGER = uapi.IRQ_SET_ACTION_MASK, uapi.IRQ_SET_ACTION_UNMASK, uapi.IRQ_SET_ACTION_TRIGGER
GET, SET, PROBE = uapi.FEATURE_GET, uapi.FEATURE_SET, uapi.FEATURE_PROBE
STATE = Feature.MIG_DEVICE_STATE


@pytest.fixture
def eventfds():
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("index", "flags", "start", "count", "data", "fds", "error"),
    [
        (5, NONE | TRIGGER, 0, 0, b"", 0, errno.EINVAL),
        (0xFFFFFFFF, NONE | TRIGGER, 0, 0, b"", 0, errno.EINVAL),
        (INTX, TRIGGER, 0, 1, b"", 0, errno.EINVAL),
        (INTX, NONE | BOOL | TRIGGER, 0, 1, b"\1", 0, errno.EINVAL),
        (INTX, 7 | TRIGGER, 0, 1, b"\1", 0, errno.EINVAL),
        (INTX, NONE | TRIGGER | 0x40, 0, 1, b"", 0, errno.EINVAL),
        (INTX, NONE, 0, 1, b"", 0, errno.ENOTTY),
        (INTX, NONE | MASK | UNMASK, 0, 1, b"", 0, errno.ENOTTY),
        (INTX, NONE | TRIGGER | UNMASK, 0, 1, b"", 0, errno.ENOTTY),
        (INTX, EVENTFD | MASK, 0, 1, b"", 1, errno.ENOTTY),
        (INTX, NONE | TRIGGER, 1, 0, b"", 0, errno.EINVAL),
        (INTX, NONE | TRIGGER, 0, 2, b"", 0, errno.EINVAL),
        (INTX, NONE | TRIGGER, 0xFFFFFFFF, 1, b"", 0, errno.EINVAL),
        (INTX, NONE | TRIGGER, 1, 0xFFFFFFFF, b"", 0, errno.EINVAL),
        (INTX, EVENTFD | TRIGGER, 0, 2, b"", 2, errno.EINVAL),
        (INTX, EVENTFD | TRIGGER, 0, 1, b"", 2, errno.EINVAL),
        (INTX, BOOL | TRIGGER, 0, 1, b"", 0, errno.EINVAL),
        (MSI, EVENTFD | TRIGGER, 0, 1, b"", 1, errno.EINVAL),
        (MSI, NONE | TRIGGER, 0, 1, b"", 0, errno.EINVAL),
        (MSI, NONE | TRIGGER, 0, 0, b"", 0, errno.EINVAL),
        (MSI, NONE | MASK, 0, 1, b"", 0, errno.ENOTTY),
        (MSI, NONE | UNMASK, 0, 1, b"", 0, errno.ENOTTY),
        (MSIX, EVENTFD | TRIGGER, 0, 1, b"", 1, errno.EINVAL),
        (MSIX, NONE | TRIGGER, 0, 0, b"", 0, errno.EINVAL),
        (ERR, EVENTFD | TRIGGER, 0, 1, b"", 1, errno.EINVAL),
    ],
)
def test_interrupt_refusals_are_the_kernels(shared_edu, eventfds, index, flags, start, count, data, fds, error):
    """The guest has INTx armed, no MSI-X and no error interrupt."""
    with pytest.raises(ReplyError) as caught:
        shared_edu.client.set_irqs(index, flags, start, count, data=data, fds=eventfds[:fds])
    assert caught.value.errno == error


@pytest.mark.parametrize(
    "payload", [b"", bytes(19), uapi.IRQ_SET.pack(19, 0x21, 0, 0, 0), uapi.IRQ_SET.pack(0, 0x21, 0, 0, 0)]
)
def test_short_set_irqs_are_refused(shared_edu, payload):
    with pytest.raises(ReplyError) as caught:
        shared_edu.client.call(Command.DEVICE_SET_IRQS, payload)
    assert caught.value.errno == errno.EINVAL


def test_fds_that_are_no_eventfds_are_refused(shared_edu):
    with open(os.devnull) as null:
        for _ in range(2):
            with pytest.raises(ReplyError) as caught:
                shared_edu.client.set_irq_eventfds(INTX, 0, [null.fileno()])
            assert caught.value.errno == errno.EINVAL
    shared_edu.interrupts.arm()


def refusal(client, flags, data=b"", argsz=None):
    payload = uapi.DEVICE_FEATURE.pack(8 + len(data) if argsz is None else argsz, flags) + data
    with pytest.raises(ReplyError) as caught:
        client.call(Command.DEVICE_FEATURE, payload, room=4096)
    return caught.value.errno


@pytest.mark.parametrize(
    ("flags", "data", "argsz", "error"),
    [
        (Feature.MIGRATION | GET | 0x80000, b"", 16, errno.EINVAL),
        (STATE | GET | SET, bytes(8), None, errno.EINVAL),
        (STATE, bytes(8), None, errno.EINVAL),
        (Feature.MIGRATION | SET, bytes(8), None, errno.EINVAL),
        (Feature.MIGRATION | SET | PROBE, b"", None, errno.EINVAL),
        (Feature.MIGRATION | GET, b"", 8, errno.EINVAL),
        (Feature.MIGRATION | GET, b"", 7, errno.EINVAL),
        (STATE | SET, b"\1\0\0\0", None, errno.EINVAL),
        (STATE | SET, b"", 16, errno.EINVAL),
        (99 | GET, b"", 4096, errno.ENOTTY),
        (99 | PROBE, b"", None, errno.ENOTTY),
        (Feature.DMA_LOGGING_START | SET, bytes(16), None, errno.ENOTTY),
        (Feature.BUS_MASTER | SET, bytes(4), None, errno.ENOTTY),
        (Feature.MIG_PRECOPY_INFO | SET, b"", None, errno.EINVAL),
    ],
)
def test_feature_refusals_are_the_kernels(shared_edu, flags, data, argsz, error):
    assert refusal(shared_edu.client, flags, data, argsz) == error


def test_probes(shared_edu):
    client = shared_edu.client
    assert client.feature_probe(Feature.MIGRATION, GET)
    assert client.feature_probe(STATE, GET | SET)
    assert client.feature_probe(STATE)
    assert not client.feature_probe(Feature.MIGRATION, SET)
    assert not client.feature_probe(Feature.DMA_LOGGING_START)
    assert client.migration_flags() == uapi.MIGRATION_STOP_COPY
    assert 0 < client.mig_data_size() < 1 << 30


@pytest.mark.parametrize(
    "state", [MigState.ERROR, MigState.RUNNING_P2P, MigState.PRE_COPY, MigState.PRE_COPY_P2P, 8, 255, 0xFFFFFFFF]
)
def test_states_that_are_not_offered(shared_edu, state):
    request = uapi.FEATURE_STATE.pack(state & 0xFFFFFFFF, -1)
    assert refusal(shared_edu.client, STATE | SET, request) == errno.EINVAL
    assert shared_edu.client.mig_state() == MigState.RUNNING
