"""A command that wants no reply gets none, not even an error."""

import errno

import pytest

from tests.protocol.served import FLR_BIT, FLR_BYTE, REG_BROKEN, UNDECLARED, access
from vfu_server import uapi
from vfu_server.policy import Answer, StateClass
from vfu_server.uapi import Command, HeaderFlag, RegionIndex

ANSWERED_BY_THE_PUMP = [
    (Command.REGION_READ, access(0, 0, 4)),
    (Command.REGION_READ, access(9, 0, 4)),
    (Command.REGION_WRITE, access(0, 0, 4, b"abcd")),
    (Command.REGION_WRITE, access(0, UNDECLARED, 4, b"abcd")),
    (Command.REGION_WRITE, access(0, REG_BROKEN, 4, b"abcd")),
    (Command.REGION_WRITE, access(0, 0, 3, b"abc")),
    (Command.REGION_WRITE, access(0, 0, 0)),
    (Command.REGION_WRITE, b""),
    (Command.REGION_WRITE_MULTI, bytes(32)),
    (Command.DEVICE_GET_INFO, uapi.DEVICE_INFO.pack(16, 0, 0, 0)),
    (Command.DEVICE_GET_INFO, b""),
    (Command.DEVICE_GET_REGION_INFO, uapi.REGION_INFO.pack(64, 0, 0, 0, 0, 0)),
    (Command.DEVICE_GET_REGION_INFO, bytes(32)),
    (Command.DEVICE_GET_REGION_IO_FDS, bytes(16)),
    (Command.DEVICE_GET_IRQ_INFO, uapi.IRQ_INFO.pack(16, 0, 2, 0)),
    (Command.DEVICE_GET_IRQ_INFO, uapi.IRQ_INFO.pack(16, 0, 99, 0)),
    (Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(24, 0, 0, 0x1000)),
    (Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(24, 0, 1, 1)),
    (Command.DMA_UNMAP, uapi.DMA_UNMAP.pack(24, 2, 0, 0)),
    (Command.DMA_MAP, b"short"),
    (Command.MIG_DATA_READ, uapi.MIG_DATA.pack(16, 8)),
    (Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(16, 8) + bytes(8)),
    (Command.VERSION, bytes(4)),
    (Command.DMA_READ, uapi.DMA_ACCESS.pack(0, 8)),
    (Command.DIRTY_PAGES, bytes(16)),
    (0, b""),
    (77, bytes(8)),
]


@pytest.mark.parametrize(("command", "payload"), ANSWERED_BY_THE_PUMP)
def test_the_pump_does_not_answer(served, client, command, payload):
    client.send_message(command, payload, flags=HeaderFlag.NO_REPLY)
    # a reply to it would come before this one, and the client would not forgive it
    assert client.get_info().num_irqs == 5
    served.settle(client)


@pytest.mark.parametrize("error", [0, errno.EIO])
@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.DEVICE_SET_IRQS, uapi.IRQ_SET.pack(20, 0x21, 0, 0, 0)),
        (Command.DEVICE_RESET, b""),
        (Command.DEVICE_FEATURE, uapi.DEVICE_FEATURE.pack(8, 0x40001)),
        (Command.DMA_MAP, uapi.DMA_MAP.pack(32, 3, 0, 0, 0x1000)),
        (Command.REGION_WRITE, access(RegionIndex.CONFIG, FLR_BYTE, 1, bytes([FLR_BIT]))),
    ],
)
def test_the_answer_of_the_session_is_not_sent(served, client, command, payload, error):
    client.send_message(command, payload, flags=HeaderFlag.NO_REPLY)
    message = served.message(command)
    assert message.no_reply
    served.context.reply(b"answer" if not error else b"", error)
    _, reply = served.answer(client, Command.DEVICE_RESET)
    assert reply.errno == 0


def test_errors_that_nobody_is_told_are_noticed(served, client):
    client.write(0, UNDECLARED, 4, 1, posted=True)
    client.write(9, 0, 4, 1, posted=True)
    served.settle(client)
    assert any("Operation not permitted" in text for text in served.notices)
    assert any("bad region index 9" in text for text in served.notices)
    assert served.context.statistics().accesses[Answer.REFUSE, StateClass.RUNNING, "write"] == 1
