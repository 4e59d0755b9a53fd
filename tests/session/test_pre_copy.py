"""Pre-copy through a whole session: counts, rounds, switch-over, cancel, what slow and failing saves do."""

import errno
import itertools
import time

import pytest

from tests.plugins_synthetic.device import FAULTS, REG_CHANGE, REG_CHANGE_MANY, REG_DIGEST, REG_FAULT
from tests.plugins_synthetic.in_process import in_process
from vfu_server import uapi
from vfu_server.device import PrecopyInfo
from vfu_server.libvfio_user.context import RING_SIZE
from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import StreamEnd, StreamHeader, StreamReader, StreamSection
from vfu_server.testing import Progress, ReplyError, migrate, save, save_early
from vfu_server.uapi import Feature, MigState

KIB, MIB = 1 << 10, 1 << 20
R, S, SC, RES = MigState.RUNNING, MigState.STOP, MigState.STOP_COPY, MigState.RESUMING
P, PP, RP = MigState.PRE_COPY, MigState.PRE_COPY_P2P, MigState.RUNNING_P2P


def refusal(call, *arguments):
    with pytest.raises(ReplyError) as caught:
        call(*arguments)
    return caught.value.errno


def items(data):
    reader = StreamReader(crc32c)
    found = reader.push(data)
    reader.finish()
    return found


def early(client):
    return b"".join(save_early(client))


def rest(client):
    client.set_mig_state(SC)
    return b"".join(save(client))


@pytest.fixture(params=[False, True], ids=["plain", "p2p"])
def source(request):
    """A served device of 16 pages of 64 KiB that can pre-copy, and its client."""
    with in_process(size=MIB, page=64 * KIB, pre_copy=True, p2p=request.param) as served, served.connect() as client:
        client.served = served
        yield client


# --- counts


def test_the_counts_fall_with_reads_and_rise_with_changes(source):
    source.set_mig_state(P)
    told = source.precopy_info()
    assert told.initial_bytes >= MIB
    assert told.dirty_bytes == 0
    data = b""
    while len(data) < MIB // 2:
        data += source.mig_data_read(100_000)
    assert MIB // 2 - 100_000 <= source.precopy_info().initial_bytes <= MIB // 2 + 2 * 64 * KIB
    data += early(source)
    assert len(data) > MIB
    assert source.precopy_info() == PrecopyInfo(0, 0)
    for page in (3, 5, 3):
        source.write(0, REG_CHANGE, 4, page)
    told = source.precopy_info()
    assert told.initial_bytes == 0
    assert told.dirty_bytes >= 2 * 64 * KIB
    changed = early(source)
    assert 2 * 64 * KIB < len(changed) < 3 * 64 * KIB
    assert source.precopy_info() == PrecopyInfo(0, 0)
    source.set_mig_state(R)


def test_a_read_behind_counts_that_are_not_zero_gives_data(source):
    source.set_mig_state(P)
    early(source)
    for n in range(50):
        source.write(0, REG_CHANGE, 4, n % 16)
        assert source.precopy_info().dirty_bytes >= 64 * KIB
        assert source.mig_data_read(MIB)
        early(source)
    source.set_mig_state(R)


def test_changes_are_found_without_being_asked_for(source):
    """A client that knows nothing of the counts gets them all the same, some time."""
    source.set_mig_state(P)
    early(source)
    source.write(0, REG_CHANGE, 4, 1)
    deadline = time.monotonic() + 2
    while not (data := early(source)):
        assert time.monotonic() < deadline
        source.serve(0.01)
    assert len(data) > 64 * KIB
    source.set_mig_state(R)


@pytest.mark.parametrize("state", [R, S, SC, RES])
def test_the_counts_are_for_pre_copy_only(source, state):
    source.set_mig_state(state)
    assert refusal(source.precopy_info) == errno.EINVAL
    source.reset()


def test_the_counts_are_found_by_a_probe(source):
    assert source.feature_probe(Feature.MIG_PRECOPY_INFO, uapi.FEATURE_GET)
    assert source.feature_probe(Feature.MIG_PRECOPY_INFO, uapi.FEATURE_SET)
    source.set_mig_state(P)
    assert refusal(source.feature_get, Feature.MIG_PRECOPY_INFO, b"", 23) == errno.EINVAL
    source.feature_set(Feature.MIG_PRECOPY_INFO)
    assert source.precopy_info().initial_bytes > 0


def test_a_device_without_pre_copy_has_no_counts():
    with in_process(p2p=True) as served, served.connect() as client:
        assert not client.feature_probe(Feature.MIG_PRECOPY_INFO, uapi.FEATURE_GET)
        assert refusal(client.precopy_info) == errno.EINVAL
        assert refusal(client.set_mig_state, P) == errno.EINVAL


def test_a_new_first_pass_is_told_once_and_to_those_who_want_it(source):
    device = source.served.device
    source.set_mig_state(P)
    early(source)
    answer = device.precopy_info

    async def begins_anew():
        device.precopy_info = answer
        return PrecopyInfo(0, 0, reinit=True)

    device.precopy_info = begins_anew
    source.serve(0.2)  # nobody asks; the server itself has looked
    assert not source.precopy_info().reinit
    source.feature_set(Feature.MIG_PRECOPY_INFO)
    device.precopy_info = begins_anew
    source.serve(0.2)
    assert source.precopy_info().reinit
    assert not source.precopy_info().reinit


# --- the stream


def test_what_is_given_early_and_late_is_one_sound_stream(source):
    source.set_mig_state(P)
    data = early(source)
    source.write(0, REG_CHANGE, 4, 7)
    source.precopy_info()
    data += early(source)
    source.write(0, REG_CHANGE, 4, 9)
    data += rest(source)
    found = items(data)
    assert isinstance(found[0], StreamHeader)
    assert isinstance(found[-1], StreamEnd)
    pages = [i.section.payload[0] for i in found if isinstance(i, StreamSection) and i.section.tag == "page"]
    assert sorted(pages) == sorted([*range(16), 7, 9])
    source.set_mig_state(R)


@pytest.mark.parametrize("fetched", [0, 1, 5 * MIB + 3])
def test_a_stop_in_the_middle_of_a_section_goes_on_where_it_was(fetched):
    """The ring is full and a section half inside it when the client goes on."""
    for p2p in (False, True):
        with in_process(size=48 * MIB, page=16 * MIB - 8, pre_copy=True, p2p=p2p) as served, served.connect() as client:
            client.set_mig_state(P)
            data = b""
            while len(data) < fetched:
                data += client.mig_data_read(min(MIB, fetched - len(data)))
            if p2p:
                client.set_mig_state(PP)
                assert client.precopy_info().initial_bytes > 0
                data += client.mig_data_read(MIB)
            data += rest(client)
            pages = [
                i.section.payload[0]
                for i in items(data)
                if isinstance(i, StreamSection) and len(i.section.payload) > MIB
            ]
            assert sorted(pages) == [0, 1, 2]


def test_in_pre_copy_p2p_what_was_given_can_be_fetched_to_its_end():
    with in_process(size=48 * MIB, page=16 * MIB - 8, pre_copy=True, p2p=True) as served, served.connect() as client:
        client.set_mig_state(P)
        data = b""
        while len(data) < MIB:
            data += client.mig_data_read(MIB)
        client.set_mig_state(PP)
        deadline = time.monotonic() + 5
        while served.session._save.unfetched:
            data += early(client)
            assert time.monotonic() < deadline
        assert len(data) > 16 * MIB
        assert refusal(client.mig_data_read, MIB) == errno.ENOMSG
        client.set_mig_state(P)
        data += early(client)
        assert sum(isinstance(i, StreamSection) for i in items(data + rest(client))) == 4


def test_the_end_is_told_as_often_as_it_is_asked_for(source):
    rest(source)
    assert [source.mig_data_read(n) for n in (1, MIB, 100)] == [b""] * 3


# --- cancel, switch-over


def test_a_cancel_changes_nothing(source):
    device = source.served.device
    source.write(0, REG_CHANGE, 4, 2)
    digest = source.read(0, REG_DIGEST, 8)
    for n in range(3):
        source.set_mig_state(P)
        source.mig_data_read(100 * n + 1)
        source.set_mig_state(R)
        assert source.mig_state() is R
        assert refusal(source.mig_data_read, 100) == errno.EINVAL
        assert (source.read(0, REG_DIGEST, 8), device.tracker.on, device.counts["save_end"]) == (digest, False, n + 1)
    assert device.counts["stop full"] == device.counts["stop p2p"] == device.counts["reset"] == 0
    assert len(rest(source)) > MIB
    source.set_mig_state(R)
    assert source.read(0, REG_DIGEST, 8) == digest


def test_a_device_that_changes_is_moved_when_the_rest_is_small():
    shape = {"size": 64 * MIB, "page": MIB, "pre_copy": True}
    with (
        in_process(**shape, p2p=True) as here,
        in_process(**shape) as there,
        here.connect() as source,
        there.connect() as destination,
    ):
        source.write(0, REG_CHANGE_MANY, 4, 100)
        given = itertools.count(1)

        def change(progress: Progress) -> None:  # a page for every eight that go out, however slow the machine is
            if progress.step == "pre-copy data" and next(given) % 8 == 0:
                source.write(0, REG_CHANGE_MANY, 4, 1)

        record = migrate(source, destination, tell=change)
        assert record.pre_copy_bytes > 64 * MIB
        assert record.stop_copy_bytes < 4 * MIB
        assert record.rounds > 1
        assert there.device.generations == here.device.generations
        assert (source.mig_state(), destination.mig_state()) == (S, R)


def test_a_destination_refuses_another_device_before_the_source_is_stopped():
    with (
        in_process(size=2 * MIB, pre_copy=True) as here,
        in_process(size=3 * MIB, pre_copy=True) as there,
        here.connect() as source,
        there.connect() as destination,
    ):
        with pytest.raises(ReplyError) as caught:
            migrate(source, destination)
        assert "migration failed in step 'pre-copy data'" in caught.value.__notes__
        assert (caught.value.errno, source.mig_state()) == (errno.EINVAL, R)
        assert here.device.counts["stop full"] == 0
        assert destination.mig_state() is RES
        destination.reset()
        assert destination.mig_state() is R


def test_the_header_alone_is_enough_to_refuse():
    with (
        in_process(size=2 * MIB, pre_copy=True) as here,
        in_process(size=3 * MIB) as there,
        here.connect() as source,
        there.connect() as destination,
    ):
        source.set_mig_state(P)
        destination.set_mig_state(RES)
        with pytest.raises(ReplyError) as caught:  # at that write: for a while there may be no other
            destination.mig_data_write(source.mig_data_read(200))
        assert caught.value.errno == errno.EINVAL


# --- the arcs of P2P


def test_the_device_is_told_each_step():
    with in_process(size=MIB, pre_copy=True, p2p=True) as served, served.connect() as client:
        steps = ("stop p2p", "stop full", "start p2p", "start full")
        for wish, told in (
            (RP, (1, 0, 0, 0)),
            (S, (1, 1, 0, 0)),
            (RP, (1, 1, 0, 1)),
            (PP, (1, 1, 0, 1)),
            (P, (1, 1, 1, 1)),
            (PP, (2, 1, 1, 1)),
            (SC, (2, 2, 1, 1)),
            (R, (2, 2, 2, 2)),
            (P, (2, 2, 2, 2)),
            (SC, (3, 3, 2, 2)),
            (RES, (3, 3, 2, 2)),
        ):
            client.set_mig_state(wish)
            assert tuple(served.device.counts[step] for step in steps) == told, wish
        client.reset()


def test_a_p2p_device_accepts_accesses_of_its_peers_and_changes():
    with in_process(size=MIB, page=64 * KIB, pre_copy=True, p2p=True) as served, served.connect() as client:
        client.set_mig_state(P)
        data = early(client)
        client.set_mig_state(PP)
        client.write(0, REG_CHANGE, 4, 4)
        assert refusal(client.mig_data_read, MIB) == errno.ENOMSG
        assert client.precopy_info().dirty_bytes == 64 * KIB
        pages = [i.section.payload[:9] for i in items(data + rest(client)) if isinstance(i, StreamSection)]
        assert bytes([4, *bytes(7), 1]) in pages


# --- failures


def order(client, fault):
    client.write(0, REG_FAULT, 4, FAULTS.index(fault))


def test_a_failed_pre_copy_does_not_stop_the_device(source):
    order(source, "save early")
    source.set_mig_state(P)
    with pytest.raises(ReplyError) as caught:
        early(source)
    assert caught.value.errno == errno.EIO
    for _ in range(2):
        assert refusal(source.set_mig_state, SC) == errno.EIO
        assert source.mig_state() is P
    assert source.served.device.counts["stop full"] == 0
    source.set_mig_state(R)
    assert len(rest(source)) > MIB


def test_a_failed_save_goes_back_to_running(source):
    order(source, "save")
    source.set_mig_state(SC)
    with pytest.raises(ReplyError) as caught:
        b"".join(save(source))
    assert caught.value.errno == errno.EIO
    assert source.mig_state() is SC
    source.set_mig_state(R)
    assert len(rest(source)) > MIB


def test_a_stop_that_fails_goes_on_with_pre_copy(source):
    source.set_mig_state(P)
    data = early(source)
    order(source, "stop")
    assert refusal(source.set_mig_state, SC) == errno.EIO
    assert source.mig_state() is P
    source.write(0, REG_CHANGE, 4, 1)
    source.precopy_info()
    data += early(source) + rest(source)
    assert sum(isinstance(i, StreamSection) for i in items(data)) == 18


@pytest.mark.parametrize("state", [P, SC])
def test_an_end_that_the_plugin_cannot_take_is_an_end(source, state):
    order(source, "save_end")
    source.set_mig_state(state)
    source.set_mig_state(R)
    assert source.mig_state() is R
    assert source.served.device.counts["save_end"] == 1


# --- time


def test_a_slow_save_is_bridged_with_padding():
    with in_process(size=MIB, slow=2.3) as served, served.connect() as client:
        begun = time.monotonic()
        client.set_mig_state(SC)
        assert time.monotonic() - begun < 2.2
        data, waits = b"", []
        while True:
            asked = time.monotonic()
            chunk = client.mig_data_read(MIB)
            waits.append(time.monotonic() - asked)
            data += chunk
            if not chunk:
                break
        assert max(waits) < 2.2
        assert time.monotonic() - begun > 2.2
        found = items(data)
        assert found[-1].skipped >= 1
        assert sum(isinstance(i, StreamSection) for i in found) == 2


def test_a_pre_copy_that_is_slow_does_not_keep_its_reader():
    with in_process(size=MIB, pre_copy=True, slow_early=1.5) as served, served.connect() as client:
        client.set_mig_state(P)
        header = client.mig_data_read(MIB)
        asked = time.monotonic()
        assert refusal(client.mig_data_read, MIB) == errno.ENOMSG
        assert time.monotonic() - asked < 1.4
        data = b""
        while not data:
            data = early(client)
        assert time.monotonic() - asked > 1.4
        assert len(header) < 200 < MIB < len(data)


def test_a_save_waits_for_its_reader():
    with in_process(size=64 * MIB) as served, served.connect() as client:
        client.set_mig_state(SC)
        device, ring = served.device, served.session._context.ring
        client.serve(0.3)
        assert len(device.tracker.first) >= 64 - 6
        assert ring.used == RING_SIZE
        data = client.mig_data_read(MIB)
        data += b"".join(save(client))
        assert not device.tracker.first
        assert len(data) > 64 * MIB


def test_a_load_waits_for_the_device():
    with (
        in_process(size=12 * MIB) as here,
        in_process(size=12 * MIB, slow_load=0.05) as there,
        here.connect() as source,
        there.connect() as destination,
    ):
        record = migrate(source, destination)
        assert record.seconds("stop-copy data") > 0.05 * 6
        assert there.device.generations == here.device.generations


def test_the_size_of_the_rest_is_told_in_every_state(source):
    whole = source.mig_data_size()
    assert MIB <= whole < MIB + 64 * KIB
    source.set_mig_state(P)
    assert MIB <= source.mig_data_size() < MIB + 64 * KIB
    early(source)
    assert source.mig_data_size() < 64 * KIB
    source.write(0, REG_CHANGE, 4, 1)
    assert 64 * KIB <= source.mig_data_size() < 128 * KIB
    rest(source)
    assert source.mig_data_size() < 64 * KIB
    source.set_mig_state(RES)
    assert MIB <= source.mig_data_size() < MIB + 64 * KIB
    source.reset()
    assert source.mig_data_size() == whole
    order(source, "estimate")
    assert refusal(source.mig_data_size) == errno.EIO
