"""What the cookbook shows holds: a mailbox that is lost stays lost, an image that is not whole is refused."""

import pytest
import trio
from trio.testing import MockClock

from tests.documents import TREE, blocks
from tests.plugins.carry import ListSink
from vfu_server.device import Section
from vfu_server.errors import DeadlineError, HostError, PluginError, StreamFormatError
from vfu_server.policy import Answer
from vfu_server.region import MmapMode, compile_rules


@pytest.fixture(scope="module")
def shown():
    """All names of the page."""
    names: dict[str, object] = {}
    for block in blocks(TREE / "docs" / "plugins" / "cookbook.md", "python"):
        exec(compile(block.body, block.where, "exec"), names)
    return names


def run(work):
    return trio.run(work, clock=MockClock(autojump_threshold=0))


def test_mailbox(shown):
    posted, status = [], [0]

    async def main():
        mailbox = shown["Mailbox"](posted.append, lambda: status[0], lambda: b"answer", 1.0)
        assert await mailbox.command(1) == b"answer"
        status[0] = 7
        with pytest.raises(HostError, match="command 0x2 ended with status 0x7"):
            await mailbox.command(2)
        status[0] = None
        with pytest.raises(DeadlineError, match="command 0x3 was not answered within 1 s"):
            await mailbox.command(3)
        status[0] = 0
        with pytest.raises(HostError, match=r"waits for a reset: command 0x3"):
            await mailbox.command(4)
        mailbox.was_reset()
        status[0] = None
        with trio.move_on_after(0.1):
            await mailbox.command(5)
        with pytest.raises(HostError, match=r"waits for a reset: command 0x5"):
            await mailbox.command(6)

    run(main)
    assert posted == [1, 2, 3, 5]


def test_image(shown):
    data = bytes(range(256)) * 8192 + b"end"

    async def main():
        async def read(offset, length):
            return data[offset : offset + length]

        sink = ListSink()
        await shown["give_image"](len(data), read, sink)
        sections = list(sink.sections)
        assert [len(section.payload) for section in sections] == [8, 1 << 20, 1 << 20, 3]

        async def taken(these) -> bytes:
            stored = bytearray(len(data))

            async def write(offset, piece):
                stored[offset : offset + len(piece)] = piece

            image = shown["Image"](write)
            for section in these:
                await image.take(section)
            image.finish()
            return bytes(stored)

        assert await taken(sections) == data
        size = sections[0]
        wrong = (
            [],
            sections[:-1],
            sections[1:],
            [*sections, sections[-1]],
            [size, *sections],
            [Section("image-size", 1, b"1")],
            [Section("image-size", 1, (1 << 40).to_bytes(8, "little"))],
            [size, Section("image", 1, b"")],
        )
        for these in wrong:
            with pytest.raises(StreamFormatError):
                await taken(these)

    run(main)


def test_hidden_half(shown):
    device = shown["HiddenHalf"]()
    sizes = dict(device.region_sizes)
    assert list(device.policy.gaps(sizes)) == []
    assert all(Answer.MMAP not in rule.read for rule in compile_rules(device.policy, MmapMode.ALL, sizes))


@pytest.mark.parametrize(
    ("start", "length"), [(0, 0x1000), (0x10, 0x20), (0x800, 0x1000), (0xFFF, 2), (0x1000, 0x3001)]
)
def test_doorbells(shown, start, length):
    from vfu_server.policy import Policy

    rules = shown["doorbells"](0, start, length)
    policy = Policy(rules)
    policy.check({0: 0x10000})
    covered = sorted((rule.start, rule.end) for rule in rules)
    assert (covered[0][0], covered[-1][1]) == (start, start + length)
    assert sum(rule.length for rule in rules) == length
    with pytest.raises(PluginError):
        Policy([*rules, rules[0]]).check({0: 0x10000})
