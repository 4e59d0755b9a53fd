"""The firmware's answers by name and errno, and an event queue's doorbell: literal, as the kernel's driver has them."""

import errno

import pytest
from trio.testing import trio_test

from plugins.mlx5.registers import swap32
from plugins.mlx5.status import DELIVERY, STATUS, CommandError
from tests.plugins.mlx5.driven import P2P, opened
from vfu_server.errors import HostError

STATUSES = {
    0x01: "EIO",
    0x02: "EINVAL",
    0x03: "EINVAL",
    0x04: "EIO",
    0x05: "EINVAL",
    0x06: "EBUSY",
    0x07: "EAGAIN",
    0x08: "ENOMEM",
    0x09: "EINVAL",
    0x0A: "EINVAL",
    0x0F: "EAGAIN",
    0x10: "EINVAL",
    0x30: "EINVAL",
    0x40: "EINVAL",
    0x50: "EIO",
    0x51: "EIO",
    0x77: "EIO",
}
"""The last one is nobody's."""
DELIVERIES = {
    0x01: "EBADR",
    0x02: "EBADR",
    0x03: "EFAULT",
    0x04: "EFAULT",
    0x05: "EFAULT",
    0x06: "EIO",
    0x07: "ENOMSG",
    0x08: "ENOMSG",
    0x09: "ENOMSG",
    0x10: "ENOMSG",
    0x33: "EINVAL",
}


def test_the_tables_are_whole():
    assert set(STATUS) - {0} == set(STATUSES) - {0x77}
    assert set(DELIVERY) - {0} == set(DELIVERIES) - {0x33}


@pytest.mark.parametrize("status", STATUSES)
@trio_test
async def test_each_status_has_a_name_and_an_errno(status):
    async with opened() as (pf, _, device):
        pf.refuse[0x115] = [status]
        with pytest.raises(
            CommandError, match=f"SUSPEND_VHCA failed: status {status:#x} .*syndrome 0x00000bad"
        ) as caught:
            await device.stop(P2P)
        assert caught.value.errno == getattr(errno, STATUSES[status])
        assert ("unknown" in str(caught.value)) == (status == 0x77)
        await device.stop(P2P)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_each_delivery_status_has_a_name_and_an_errno(delivery):
    error = CommandError("here", "SAVE", delivery=delivery)
    assert isinstance(error, HostError)
    assert error.errno == getattr(errno, DELIVERIES[delivery])
    assert f"was not delivered: status {delivery:#x} (" in str(error)


@trio_test
async def test_an_event_queue_tells_its_number_and_how_far_it_is():
    async with opened() as (pf, _, device):
        rung, real = [], pf.bar_write
        pf.bar_write = lambda offset, width, value: rung.append((offset % 0x1000, width, swap32(value)))
        queue = device._pf.events
        kept = queue._eqn, queue._ci
        queue._eqn, queue._ci = 5, 0x102
        queue._tell(0x48)
        (queue._eqn, queue._ci), pf.bar_write = kept, real
        assert rung == [(0x48, 4, 0x05000102)]
