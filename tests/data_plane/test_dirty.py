"""Dirty pages through a whole session, from each source: any range, any page size, and no bit lost on the way."""

import errno
import random
import struct

import pytest

from tests.data_plane.rig import BDF, PAGE, Plugin, memory, rig
from tests.data_plane.sources import EXACT, SOURCES, pages_in, sourced
from vfu_server import uapi
from vfu_server.testing import ReplyError
from vfu_server.uapi import Feature, MigState

RW, READ = 3, 1
LOW = (0, 1 << 32)


@pytest.fixture
def guest():
    with memory(512 * PAGE) as fd:
        yield fd


def dirty(client, iova, length, page_size=PAGE):
    return pages_in(client.dma_logging_report(iova, length, page_size), iova, page_size)


def refused(call, *arguments):
    with pytest.raises(ReplyError) as caught:
        call(*arguments)
    return caught.value.errno


def save_all(client):
    client.set_mig_state(MigState.STOP_COPY)
    while client.mig_data_read():
        pass


def pages(*numbers):
    return {n * PAGE for n in numbers}


# --- what is offered


class OwnLog:
    """A log that the plugin has kept by its hardware: one page is written between any two questions."""

    def __init__(self) -> None:
        self.followed = None

    async def start(self, ranges, page_size):
        self.followed = list(ranges)
        return page_size

    async def report(self, iova, length, page_size):
        return struct.pack("<Q", 1 << 3 if iova == 0 else 0).ljust(-(-length // page_size // 64) * 8, b"\0")

    async def stop(self):
        self.followed = None


class Logging(Plugin):
    """A device with such a log."""

    log = OwnLog()

    @property
    def dirty_log(self):
        return self.log


@pytest.mark.parametrize("way", ["group", "cdev"])
def test_a_plugins_own_log_goes_before_any_of_the_doors(tmp_path, way, guest):
    with rig(tmp_path, way, plugin=Logging) as made, made.connect() as client:
        client.dma_map(0, 64 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        assert Logging.log.followed == [LOW]
        dirty(client, 0, 64 * PAGE)
        assert dirty(client, 0, 64 * PAGE) == pages(3)
        client.dma_logging_stop()
        assert Logging.log.followed is None


@pytest.mark.parametrize(("way", "source"), [("group", ""), ("cdev", ""), ("group", "device"), ("cdev", "iommu")])
def test_a_log_is_offered_where_somebody_keeps_one(tmp_path, way, source, guest):
    if source:
        with sourced(tmp_path, source) as (made, _), made.connect() as client:
            assert client.feature_probe(Feature.DMA_LOGGING_START, uapi.FEATURE_SET)
            assert client.feature_probe(Feature.DMA_LOGGING_REPORT, uapi.FEATURE_GET)
        return
    with rig(tmp_path, way) as made, made.connect() as client:
        assert refused(client.dma_logging_start, [LOW]) == errno.ENOTTY
        assert refused(client.dma_logging_report, 0, PAGE) == errno.ENOTTY


@pytest.mark.parametrize("kind", SOURCES)
def test_order_of_requests(tmp_path, kind, guest):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        client.dma_logging_stop()
        assert refused(client.dma_logging_report, 0, PAGE) == errno.EINVAL
        assert client.dma_logging_start([LOW]) == (PAGE if kind == "iommu" else uapi.PAGE_SIZE)
        assert refused(client.dma_logging_start, [LOW]) == errno.EINVAL
        assert source.running
        dirty(client, 0, PAGE)
        client.dma_logging_stop()
        assert not source.running
        assert refused(client.dma_logging_report, 0, PAGE) == errno.EINVAL
        client.dma_logging_start([LOW])


def test_the_devices_own_page_size_is_told(tmp_path, guest):
    with sourced(tmp_path, "device") as (made, source), made.connect() as client:
        source.log.granularity = 16 * PAGE
        assert client.dma_logging_start([LOW]) == 16 * PAGE


# --- ranges and page sizes


def some_maps(client, fd, chance):
    """Maps with gaps, a few of them read-only; (first page, pages, prot)."""
    maps, at, offset = [], chance.randrange(4), 0
    for n in range(12):
        count = chance.choice([1, 2, 3, 8, 30, 64])
        prot = READ if n % 5 == 4 else RW
        client.dma_map(at * PAGE, count * PAGE, prot=prot, fd=fd, fd_offset=offset * PAGE)
        maps.append((at, count, prot))
        at, offset = at + count + chance.randrange(3), offset + count
    return maps


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("seed", range(3))
def test_any_range_in_pages_of_any_size(tmp_path, kind, seed, guest):
    chance = random.Random(seed)
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        maps = some_maps(client, guest, chance)
        writable = {page for at, count, prot in maps if prot & 2 for page in range(at, at + count)}
        end = maps[-1][0] + maps[-1][1]
        client.dma_logging_start([LOW])
        owed = set() if kind != "all" else writable
        for _ in range(60):
            written = set(chance.sample(range(end), 6))
            source.write(*pages(*written))
            owed |= written & writable
            first, count = chance.randrange(end), chance.randrange(1, 90)
            size = chance.choice([1, 2, 4, 32, 512])
            told = dirty(client, first * PAGE, count * PAGE, size * PAGE)
            wanted = {page for page in owed if first <= page < first + count}
            assert told == {(first + (page - first) // size * size) * PAGE for page in wanted}
            if kind != "all":
                owed -= wanted


@pytest.mark.parametrize("kind", SOURCES)
def test_a_range_over_nothing_and_one_that_is_too_long(tmp_path, kind, guest):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 2 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.write(0)
        assert dirty(client, 1 << 30, 64 * PAGE) == set()
        assert refused(client.dma_logging_report, 0, 1 << 40) == errno.E2BIG
        assert refused(client.dma_logging_report, (1 << 64) - PAGE, PAGE) == errno.EOVERFLOW
        assert dirty(client, 0, 1 << 40, 1 << 30) == {0}, "the refused ones have told nothing"


def test_what_the_device_does_not_follow_counts_as_written(tmp_path, guest):
    """Memory that was plugged in later, or that the client did not name."""
    with sourced(tmp_path, "device") as (made, source), made.connect() as client:
        client.dma_map(0, 8 * PAGE, fd=guest)
        client.dma_map(1 << 33, 4 * PAGE, fd=guest)
        assert client.dma_logging_start([(0, 4 * PAGE), (6 * PAGE, 2 * PAGE)]) == uapi.PAGE_SIZE
        source.write(*pages(1, 7))
        for _ in range(2):
            assert dirty(client, 0, 8 * PAGE) - pages(1, 7) == pages(4, 5)
        assert dirty(client, 0, 1 << 34, 1 << 33) == {0, 1 << 33}
        assert {(iova, length) for iova, length, _ in source.log.asked} == {(0, 4 * PAGE), (6 * PAGE, 2 * PAGE)}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_client_that_names_no_ranges_has_all_of_them_watched(tmp_path, kind, guest):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(PAGE, 8 * PAGE, fd=guest)
        client.dma_map(1 << 33, 4 * PAGE, fd=guest)
        client.dma_logging_start([])
        source.write(3 * PAGE, (1 << 33) + PAGE)
        assert dirty(client, 0, 64 * PAGE) >= {3 * PAGE}
        assert dirty(client, 1 << 33, 64 * PAGE) >= {(1 << 33) + PAGE}
        if kind == "device":
            assert source.log.ranges == [(PAGE, 8 * PAGE), (1 << 33, 4 * PAGE)]
        client.dma_logging_stop()
        client.dma_unmap_all()
        client.dma_logging_start([])  # nothing is mapped: the low addresses are watched
        client.dma_map(0, PAGE, fd=guest)
        source.write(0)
        assert dirty(client, 0, PAGE) == {0}


# --- nothing is lost


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("how", ["exactly", "coarsely", "all"])
def test_unmapped_memory_is_told_of_once(tmp_path, kind, how, guest):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        for n in range(4):
            client.dma_map(4 * n * PAGE, 4 * PAGE, fd=guest, fd_offset=4 * n * PAGE)
        client.dma_logging_start([LOW])
        source.write(*pages(1, 5, 9, 13))
        if how == "exactly":
            client.dma_unmap(4 * PAGE, 4 * PAGE)
        elif how == "coarsely":
            client.dma_unmap(4 * PAGE, 1 << 30)
        else:
            client.dma_unmap_all()
        gone = {"exactly": {5}, "coarsely": {5, 9, 13}, "all": {1, 5, 9, 13}}[how]
        told = dirty(client, 0, 16 * PAGE)
        assert told >= pages(1, 5, 9, 13)
        if kind in EXACT:
            assert told == pages(1, 5, 9, 13)
        left = [m for m in made.space.maps if m.prot & 2]
        assert not any(made.space.find(page) for page in pages(*gone))
        again = dirty(client, 0, 16 * PAGE)
        assert again == (set() if kind in EXACT else {p for m in left for p in range(m.iova, m.iova + m.size, PAGE)})


@pytest.mark.parametrize("kind", EXACT)
def test_unmapped_and_mapped_again_before_anybody_asks(tmp_path, kind, guest):
    """As firmware does with low memory at each boot: the pages are the same, and dirty."""
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 16 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.write(*pages(2, 3))
        for _ in range(3):
            client.dma_unmap(0, 16 * PAGE)
            client.dma_map(0, 4 * PAGE, fd=guest)
            client.dma_map(4 * PAGE, 12 * PAGE, fd=guest, fd_offset=4 * PAGE)
            source.write(*pages(9))
        assert dirty(client, 0, 8 * PAGE, 8 * PAGE) == {0}
        assert dirty(client, 0, 16 * PAGE) == pages(9)
        assert dirty(client, 0, 16 * PAGE) == set()


@pytest.mark.parametrize("kind", EXACT)
def test_an_unmap_that_is_refused_loses_nothing(tmp_path, kind, guest):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 8 * PAGE, fd=guest)
        client.dma_map(8 * PAGE, 8 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.write(*pages(1, 9))
        assert refused(client.dma_unmap, 0, 12 * PAGE) == errno.EINVAL
        assert dirty(client, 0, 16 * PAGE) == pages(1, 9)
        assert len(made.space.maps) == 2


@pytest.mark.parametrize("kind", EXACT)
def test_a_report_that_fails_leaves_its_range_as_written(tmp_path, kind, guest):
    """The source may have forgotten what it did not tell: the kernel's rule is to take all for written."""
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        client.dma_map(4 * PAGE, 2 * PAGE, prot=READ, fd=guest)
        client.dma_map(8 * PAGE, 4 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.write(*pages(1, 10))
        source.fail_next(errno.EIO)
        assert refused(client.dma_logging_report, 0, 8 * PAGE) == errno.EIO
        assert dirty(client, 0, 16 * PAGE) == pages(0, 1, 2, 3, 10)
        assert dirty(client, 0, 16 * PAGE) == set()


@pytest.mark.parametrize("kind", EXACT)
def test_memory_that_goes_while_its_bits_cannot_be_read_counts_as_written(tmp_path, kind, guest, caplog):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        client.dma_map(4 * PAGE, 4 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.fail_next(errno.EIO)
        client.dma_unmap(0, 4 * PAGE)
        assert "all of it counts" in caplog.text
        assert dirty(client, 0, 8 * PAGE) == pages(0, 1, 2, 3)


@pytest.mark.parametrize("kind", EXACT)
def test_a_cancelled_migration_keeps_what_was_not_told(tmp_path, kind, guest):
    with sourced(tmp_path, kind, pre_copy=True) as (made, source), made.connect() as client:
        client.dma_map(0, 16 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        client.set_mig_state(MigState.PRE_COPY)
        source.write(*pages(1, 9))
        assert dirty(client, 0, 8 * PAGE) == pages(1)
        client.set_mig_state(MigState.RUNNING)  # given up, and begun again with the same log
        source.write(*pages(2))
        client.set_mig_state(MigState.PRE_COPY)
        assert dirty(client, 0, 16 * PAGE) == pages(2, 9)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("fault", ["stop", "save"])
def test_a_failed_migration_keeps_what_was_not_told(tmp_path, kind, guest, fault):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 16 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.write(*pages(1, 9))
        assert dirty(client, 0, 8 * PAGE) == pages(1)
        made.first.plugin.faults.append(fault)
        with pytest.raises(ReplyError):
            save_all(client)
        client.set_mig_state(MigState.RUNNING)
        source.write(*pages(2))
        assert dirty(client, 0, 16 * PAGE) == pages(2, 9)


@pytest.mark.parametrize("kind", EXACT)
def test_the_last_pages_are_told_when_the_device_is_stopped(tmp_path, kind, guest):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 16 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.write(*pages(3))
        client.set_mig_state(MigState.STOP_COPY)
        assert dirty(client, 0, 16 * PAGE) == pages(3)
        client.dma_logging_stop()


@pytest.mark.parametrize("kind", EXACT)
def test_who_begins_anew_owes_and_is_owed_nothing(tmp_path, kind, guest):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 16 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.write(*pages(1, 2))
        client.dma_unmap(0, 16 * PAGE)
        client.dma_logging_stop()
        client.dma_map(0, 16 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        assert dirty(client, 0, 16 * PAGE) == set()


@pytest.mark.parametrize("kind", SOURCES)
def test_the_log_goes_with_its_client(tmp_path, kind, guest):
    with sourced(tmp_path, kind) as (made, source):
        with made.connect() as client:
            client.dma_map(0, 4 * PAGE, fd=guest)
            client.dma_logging_start([LOW])
            source.write(0)
        with made.connect() as client:
            assert not source.running
            client.dma_map(0, 4 * PAGE, fd=guest)
            client.dma_logging_start([LOW])
            assert dirty(client, 0, 4 * PAGE) == (set() if kind in EXACT else pages(0, 1, 2, 3))


@pytest.mark.parametrize("kind", EXACT)
def test_a_reset_in_the_middle_loses_no_bit(tmp_path, kind, guest):
    with sourced(tmp_path, kind) as (made, source), made.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        source.write(*pages(1))
        client.reset()
        source.write(*pages(2))
        assert dirty(client, 0, 4 * PAGE) == pages(1, 2)


def test_a_log_that_cannot_be_stopped_is_stopped_before_the_next(tmp_path, guest, caplog):
    with sourced(tmp_path, "device") as (made, source), made.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        ways, least, stop = made.function.features[7]
        made.function.features[7] = (ways, least, lambda *_: _fail(errno.EIO))
        assert refused(client.dma_logging_stop) == errno.EIO
        assert refused(client.dma_logging_report, 0, PAGE) == errno.EINVAL
        assert refused(client.dma_logging_start, [LOW]) == errno.EIO
        made.function.features[7] = (ways, least, stop)
        client.dma_logging_start([LOW])
        source.write(0)
        assert dirty(client, 0, PAGE) == {0}


def _fail(number):
    raise OSError(number, "ordered")


def test_unmaps_go_by_c_alone_while_nothing_is_logged(tmp_path, guest):
    """Nobody in Python is woken for one."""
    with sourced(tmp_path, "device") as (made, source), made.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        client.dma_logging_start([LOW])
        client.dma_logging_stop()
        source.log.failures.append(errno.EIO)
        client.dma_unmap(0, 4 * PAGE)
        assert source.log.failures == [errno.EIO]
        assert made.session.mig_state is MigState.RUNNING


def test_the_request_of_a_kernel_that_answers_short(tmp_path, guest):
    """Not even a driver that breaks the layout gets further than an error."""
    with sourced(tmp_path, "device") as (made, _), made.connect() as client:
        client.dma_map(0, 4 * PAGE, fd=guest)
        data = struct.pack("=QII", PAGE, 300, 0) + bytes(16 * 300)
        assert refused(client.feature_set, Feature.DMA_LOGGING_START, data) == errno.E2BIG
        assert made.served[BDF].lost is None
