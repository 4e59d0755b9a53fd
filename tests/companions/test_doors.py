"""CompanionDoors by itself: who opens, who waits, who is told, and in which order things end."""

import errno
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.host.tree import Machine
from vfu_server.config import DeviceConfig, Source, SourceKind
from vfu_server.errors import HostError
from vfu_server.host_device import HostEvent
from vfu_server.server_companions import CompanionDoors
from vfu_server.server_doors import companion_source, companion_token

OWN = Source(SourceKind.DEVICE_SOCKET, "/run/vf")
DEVICE = DeviceConfig("vf", OWN)
TOKEN = "0b4f1f6e-0000-4000-8000-1234567890ab"


class Host:
    """A door that notes when it is closed and says what it is told to say."""

    def __init__(self, name: str, story: list[str]) -> None:
        self.name, self.story = name, story
        self.closing = trio.Event()
        self.closing.set()
        self.send, self.receive = trio.open_memory_channel[HostEvent](4)

    async def events(self):
        async for event in self.receive:
            yield event
            if event.kind == "gone":
                return

    async def aclose(self) -> None:
        await self.closing.wait()
        self.story.append(f"closed {self.name}")


class World:
    def __init__(self) -> None:
        self.story: list[str] = []
        self.hosts: list[Host] = []
        self.refuse: Exception | None = None
        self.gate = trio.Event()
        self.gate.set()
        self.doors = CompanionDoors(self.open_host)
        self.mine = self.doors.of(DEVICE, OWN)
        self.other = self.doors.of(DeviceConfig("other", OWN), Source(SourceKind.DEVICE_SOCKET, "/run/other"))

    async def open_host(self, source, config):
        self.story.append(f"open {source.value}")
        await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        host = Host(source.value, self.story)
        self.hosts.append(host)
        return host

    async def serve(self, host, task_status):
        self.story.append(f"serve {host.name}")
        task_status.started([host.name])
        try:
            await trio.sleep_forever()
        finally:
            self.story.append(f"end {host.name}")


def in_world(test):
    """Run the coroutine `test(world)` with the doors alive."""

    def call():
        async def main():
            world = World()
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    await nursery.start(world.doors.run)
                    await test(world)
                    nursery.cancel_scope.cancel()

        trio.run(main)

    call.__name__ = test.__name__
    return call


@in_world
async def test_first_opens_others_share_last_closes(world):
    async with world.mine.open("pf", world.serve) as first:
        async with world.other.open("/run/vf.pf", world.serve) as second:
            assert first is second
        assert world.story == ["open /run/vf.pf", "serve /run/vf.pf"]
    assert world.story[2:] == ["end /run/vf.pf", "closed /run/vf.pf"]
    async with world.mine.open("pf", world.serve) as again:
        assert again == first
        assert again is not first
    assert world.story[4:] == world.story[:4]


@in_world
async def test_those_who_come_while_it_opens_wait_for_the_same(world):
    world.gate = trio.Event()
    values = []

    async def join(companions):
        async with companions.open("/run/pf", world.serve) as value:
            values.append(value)
            await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(join, world.mine)
        nursery.start_soon(join, world.other)
        await trio.testing.wait_all_tasks_blocked()
        world.gate.set()
    assert len(values) == 2
    assert values[0] is values[1]
    assert world.story.count("open /run/pf") == 1


@in_world
async def test_the_first_user_gives_up_while_it_opens(world):
    world.gate = trio.Event()
    values = []

    async def second():
        async with world.other.open("/run/vf.pf", world.serve) as value:
            values.append(value)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            with trio.CancelScope() as first:
                async with trio.open_nursery() as inner:
                    inner.start_soon(use, world.mine, world.serve)
                    await trio.testing.wait_all_tasks_blocked()
                    first.cancel()
            world.gate.set()
    assert not scope.cancelled_caught
    assert values == [["/run/vf.pf"]]


async def use(companions, serve):
    """Be a user until cancelled."""
    async with companions.open("/run/vf.pf", serve):
        await trio.sleep_forever()


@in_world
async def test_who_comes_while_the_task_ends_has_a_new_one_by_the_same_door(world):
    ending = trio.Event()

    async def lingering(host, task_status):
        task_status.started(1)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await ending.wait()
            world.story.append("gone")

    async def first():
        async with world.mine.open("pf", lingering):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(use, world.other, world.serve)
        nursery.start_soon(use, world.other, world.serve)
        await trio.testing.wait_all_tasks_blocked()
        assert world.story == ["open /run/vf.pf"]
        ending.set()
        await trio.testing.wait_all_tasks_blocked()
        assert world.story == ["open /run/vf.pf", "gone", "serve /run/vf.pf"]
        nursery.cancel_scope.cancel()


@in_world
async def test_who_comes_while_the_door_closes_has_it_opened_anew(world):
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with world.mine.open("pf", world.serve):
                world.hosts[0].closing = trio.Event()
                scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert world.story[-1] == "end /run/vf.pf"
        nursery.start_soon(use, world.mine, world.serve)
        await trio.testing.wait_all_tasks_blocked()
        assert world.story[-1] == "end /run/vf.pf"
        world.hosts[0].closing.set()
        await trio.testing.wait_all_tasks_blocked()
        assert world.story[-3:] == ["closed /run/vf.pf", "open /run/vf.pf", "serve /run/vf.pf"]
        nursery.cancel_scope.cancel()


@in_world
async def test_a_held_door_stays_open_between_its_users(world):
    async with world.mine.hold("pf"):
        for _ in range(2):
            async with world.mine.open("pf", world.serve):
                pass
        assert world.story == ["open /run/vf.pf", *(["serve /run/vf.pf", "end /run/vf.pf"] * 2)]
    assert world.story[-1] == "closed /run/vf.pf"


@in_world
async def test_a_door_that_cannot_be_opened(world):
    world.refuse = HostError("it is not there", errno.ENOENT)
    world.refuse.add_note("make it")
    for _ in range(2):
        with pytest.raises(HostError, match=r"^companion /run/vf.pf: it is not there\nmake it$") as caught:
            async with world.mine.open("pf", world.serve):
                pass
        assert (caught.value.errno, caught.value.__notes__) == (errno.ENOENT, ["make it"])
    assert world.story == ["open /run/vf.pf"] * 2


async def ends_early(host, task_status):
    await trio.lowlevel.checkpoint()


async def raises_early(host, task_status):
    raise HostError("it does not answer", errno.ETIMEDOUT)


async def has_a_bug(host, task_status):
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("serve", "said", "number"),
    [
        (ends_early, "its task ended before it had started", errno.EIO),
        (raises_early, "it does not answer", errno.ETIMEDOUT),
        (has_a_bug, "ValueError: a bug", errno.EIO),
    ],
)
def test_a_task_that_does_not_start(serve, said, number):
    @in_world
    async def test(world):
        for _ in range(2):
            with pytest.raises(HostError, match=f"^companion /run/vf.pf: {said}$") as caught:
                async with world.mine.open("pf", serve):
                    pass
            assert caught.value.errno == number
        assert world.story == ["open /run/vf.pf", "closed /run/vf.pf"] * 2

    test()


@pytest.mark.parametrize("end", [None, HostError("it burns"), ValueError("a bug")])
def test_a_task_that_ends_later_is_told_to_new_users_until_all_have_left(end, caplog):
    @in_world
    async def test(world):
        over = trio.Event()

        async def serve(host, task_status):
            task_status.started("value")
            await over.wait()
            if end is not None:
                raise end

        async with world.mine.open("pf", serve) as value:
            assert value == "value"
            over.set()
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(HostError, match=r"(its task has ended|it burns|ValueError: a bug)"):
                async with world.other.open("/run/vf.pf", serve):
                    pass
        async with world.other.open("/run/vf.pf", world.serve) as anew:
            assert anew == ["/run/vf.pf"]

    test()
    (said,) = [record for record in caplog.records if "the companion has failed" in record.message]
    assert bool(said.exc_info) == isinstance(end, ValueError)


@in_world
async def test_a_function_that_is_gone_ends_its_task(world):
    async with world.mine.open("pf", world.serve):
        await world.hosts[0].send.send(HostEvent("request", "it is wanted back"))
        await world.hosts[0].send.send(HostEvent("gone", "pulled out"))
        await trio.testing.wait_all_tasks_blocked()
        assert world.story[-1] == "end /run/vf.pf"
        with pytest.raises(HostError, match="the function is gone: pulled out"):
            async with world.mine.open("pf", world.serve):
                pass


def test_the_servers_end_ends_tasks_before_doors():
    story = []

    async def main():
        world = World()
        world.story = story
        async with trio.open_nursery() as nursery:
            await nursery.start(world.doors.run)
            nursery.start_soon(use, world.mine, world.serve)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert story == ["open /run/vf.pf", "serve /run/vf.pf", "end /run/vf.pf", "closed /run/vf.pf"]


def test_without_a_running_server_nothing_is_opened():
    async def main():
        with pytest.raises(HostError, match="the server does not run"):
            async with World().mine.open("pf", ends_early):
                pass

    trio.run(main)


# --- what an address means


def refused(where: str, own: Source, root: Path = Path("/")) -> str:
    with pytest.raises(HostError) as caught:
        companion_source(where, own, root)
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "kind"),
    [
        ("pf", "/run/vf.pf", SourceKind.DEVICE_SOCKET),
        ("/run/x/../pf", "/run/pf", SourceKind.DEVICE_SOCKET),
        ("./pf", f"{Path.cwd()}/pf", SourceKind.DEVICE_SOCKET),
        ("3B:00.0", "0000:3b:00.0", SourceKind.BDF),
        ("0001:3b:00.0", "0001:3b:00.0", SourceKind.BDF),
    ],
)
def test_addresses(where, value, kind):
    assert companion_source(where, OWN) == Source(kind, value)


def test_addresses_that_mean_nothing():
    for where in ("", "a b", "pf:", "0000:3b:00.9"):
        assert "it is no PCI address, path of a socket or word" in refused(where, OWN)
    assert "that is the device itself" in refused("/run/vf", OWN)
    assert "has none of that name" in refused("pf", Source(SourceKind.MDEV, TOKEN))


@pytest.fixture
def sysfs(tmp_path):
    """A PF with one VF, and a function of its own, all under vfio-pci."""
    machine = Machine(tmp_path / "root")
    machine.function("0000:3b:00.0", group=6)
    machine.function("0000:3b:00.1", parent="0000:3b:00.0")
    machine.function("0000:3c:00.0", group=8)
    return machine.root


def bdf(value: str) -> Source:
    return Source(SourceKind.BDF, f"0000:{value}")


def test_pf_is_a_vfs_physical_function(sysfs):
    assert companion_source("pf", bdf("3b:00.1"), sysfs) == bdf("3b:00.0")
    assert "0000:3c:00.0 is no virtual function" in refused("pf", bdf("3c:00.0"), sysfs)
    assert "has none of that name" in refused("mailbox", bdf("3b:00.1"), sysfs)
    assert "that is the device itself" in refused("3b:00.1", bdf("3b:00.1"), sysfs)


def test_only_its_pf_is_given_a_vfs_token(sysfs):
    assert companion_token(bdf("3b:00.0"), bdf("3b:00.1"), TOKEN, sysfs) == TOKEN
    assert companion_token(bdf("3b:00.0"), bdf("3b:00.1"), "", sysfs) == ""
    assert companion_token(bdf("3c:00.0"), bdf("3b:00.1"), TOKEN, sysfs) == ""
    assert companion_token(OWN, bdf("3b:00.1"), TOKEN, sysfs) == ""


@in_world
async def test_one_door_takes_one_token(world):
    source = bdf("3b:00.0")
    async with world.doors.hold(source, TOKEN):
        async with world.doors.hold(source, TOKEN):
            pass
        with pytest.raises(HostError, match="open with another vf token"):
            async with world.doors.hold(source, ""):
                pass
