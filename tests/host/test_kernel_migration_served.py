"""A function that its driver migrates, served whole: every arc forwarded, its bytes carried, every failure survived."""

import errno
import itertools
import os
import threading
import time

import pytest

from tests.host.fake_migration import MAGIC, P2P, PRE_COPY, STOP_COPY
from tests.host.served import served
from tests.session.kernel_model import PP, RES, RP, SC, P, R, S, way
from vfu_server.device import Section
from vfu_server.errors import VfuServerError
from vfu_server.kernel_migration import SECTION_VERSION, TAG
from vfu_server.libvfio_user.native import crc32c
from vfu_server.migration import FLAG_SETS, path, states
from vfu_server.stream import Origin, StreamReader, StreamSection, StreamWriter
from vfu_server.testing import ReplyError, migrate, save, save_early
from vfu_server.testing.migrate import load
from vfu_server.uapi import Feature, MigState

ALL = STOP_COPY | P2P | PRE_COPY
STATE = bytes(range(256)) * 11
MIB = 1 << 20


def refusal(call, *arguments) -> int:
    """The errno that a call is refused with, 0 if it is not."""
    try:
        call(*arguments)
    except ReplyError as error:
        return error.errno
    return 0


def kernel_bytes(stream: bytes) -> bytes:
    """The driver's bytes, as docs/plugins/kernel-migration.md says where they lie."""
    reader = StreamReader(crc32c)
    items = reader.push(stream)
    reader.finish()
    sections = [i.section for i in items if isinstance(i, StreamSection) and i.origin is Origin.PLUGIN]
    assert all((section.tag, section.version) == (TAG, 1) for section in sections)
    assert all(len(section.payload) <= MIB for section in sections)
    return b"".join(section.payload for section in sections)


def eventually(condition, what: str, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.002)


def reach(client, flags: int, state: MigState) -> None:
    """From RUNNING."""
    client.set_mig_state(state)
    assert client.mig_state() is state


# --- states


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_every_way_is_the_drivers_way_arc_by_arc(tmp_path, flags):
    with served(tmp_path / "root", flags, STATE) as function:
        driver, client = function.driver, function.connect()
        assert client.migration_flags() == flags
        for source, target in itertools.product(sorted(states(flags)), MigState):
            client.reset()
            reach(client, flags, source)
            driver.walked.clear()
            wanted = way(flags, source, target)
            if source is RES and wanted:  # nothing was loaded: refused there, by the server itself
                assert refusal(client.set_mig_state, target) == errno.EINVAL
                assert (client.mig_state(), driver.mig_state, driver.walked) == (RES, RES, [])
                continue
            assert refusal(client.set_mig_state, target) == (errno.EINVAL if wanted is None else 0)
            assert driver.walked == (wanted or [])
            assert client.mig_state() is driver.mig_state is (target if wanted else source)
        client.close()


@pytest.mark.parametrize("flags", FLAG_SETS)
def test_refused_arc_leaves_both_where_they_were_and_can_be_asked_for_again(tmp_path, flags):
    with served(tmp_path / "root", flags, STATE) as function:
        driver, client = function.driver, function.connect()
        for source, target in itertools.product(sorted(states(flags)), sorted(states(flags))):
            steps = way(flags, source, target)
            if source is RES or not steps or len(steps) != 1:
                continue
            client.reset()
            reach(client, flags, source)
            driver.refuse = {target: errno.EBUSY}
            ends = (source, target) in {(P, R), (PP, RP), (SC, S)}
            assert refusal(client.set_mig_state, target) == (0 if ends else errno.EBUSY)
            driver.refuse = {}
            # A save session that the driver does not end is over for the client all the same.
            assert (client.mig_state(), driver.mig_state) == (target if ends else source, source)
            if not ends:
                client.set_mig_state(target)
                assert driver.mig_state is target
            if target is not RES:
                client.set_mig_state(S)
                client.set_mig_state(R)
                assert driver.mig_state is R
        client.close()


@pytest.mark.parametrize(
    ("source", "target"), [(R, RP), (RP, S), (S, RP), (S, SC), (S, RES), (R, P), (P, PP), (PP, SC)]
)
def test_driver_that_ends_in_error_is_told_and_left_by_a_reset(tmp_path, source, target):
    with served(tmp_path / "root", ALL, STATE) as function:
        driver, client = function.driver, function.connect()
        reach(client, ALL, source)
        driver.breaks = {target}
        assert refusal(client.set_mig_state, target) == errno.EIO
        assert (client.mig_state(), driver.mig_state) == (MigState.ERROR, MigState.ERROR)
        assert refusal(client.set_mig_state, S) == errno.EINVAL
        driver.breaks = set()
        client.reset()
        assert (client.mig_state(), driver.mig_state) == (R, R)
        client.set_mig_state(SC)
        assert MAGIC in b"".join(save(client))
        client.close()


@pytest.mark.parametrize(("source", "target"), [(P, R), (PP, RP), (SC, S)])
def test_driver_that_ends_in_error_where_a_save_ends(tmp_path, source, target):
    with served(tmp_path / "root", ALL, STATE) as function:
        driver, client = function.driver, function.connect()
        reach(client, ALL, source)
        driver.breaks = {target}
        assert refusal(client.set_mig_state, target) == errno.EIO
        assert client.mig_state() is MigState.ERROR
        client.reset()
        assert (client.mig_state(), driver.mig_state) == (R, R)
        client.close()


@pytest.mark.parametrize("state", sorted(states(ALL)))
@pytest.mark.parametrize("cdev", [False, True], ids=["group", "cdev"])
def test_client_that_goes_in_any_state_leaves_the_function_free(tmp_path, state, cdev):
    with served(tmp_path / "root", ALL, STATE, cdev=cdev) as function:
        client = function.connect()
        reach(client, ALL, state)
        client.close()
        client = function.connect()
        assert (client.mig_state(), function.driver.mig_state) == (R, R)
        eventually(lambda: not function.kernel.opened("state"), "a data fd is left open")
        client.close()


def test_no_driver_that_migrates(tmp_path):
    with served(tmp_path / "root", ALL, migrates=False) as function:
        client = function.connect()
        assert client.migration_flags() == 0
        assert "does not migrate it" in function.device.capabilities.reason
        client.close()


@pytest.mark.slow
def test_driver_that_does_not_come_back_in_time_loses_the_state_until_a_reset(tmp_path):
    with served(tmp_path / "root", ALL, STATE) as function:
        driver, client = function.driver, function.connect(timeout=8)
        gate = driver.slow["state"] = threading.Event()
        began = time.monotonic()
        assert refusal(client.set_mig_state, S) == errno.ETIMEDOUT
        assert time.monotonic() - began < 4.9  # QEMU would give up at 5
        assert client.mig_state() is MigState.ERROR
        gate.set()
        client.reset()
        assert client.mig_state() is driver.mig_state is R
        client.close()


# --- data


def both(tmp_path, source_flags=ALL, destination_flags=ALL, state=STATE, **kinds):
    source = served(tmp_path / "source", source_flags, state, **kinds)
    return source, served(tmp_path / "destination", destination_flags, bytes(len(state)), **kinds)


@pytest.mark.parametrize("flags", FLAG_SETS)
@pytest.mark.parametrize("piece", [1 << 30, 7], ids=["whole", "short reads and writes"])
def test_state_moves(tmp_path, flags, piece):
    one, other = both(tmp_path, flags, flags)
    with one as source, other as destination:
        source.driver.piece = destination.driver.piece = piece
        clients = source.connect(), destination.connect()
        migrate(*clients)
        assert (source.driver.mig_state, destination.driver.mig_state) == (S, R)
        assert destination.driver.state == STATE
        for client in clients:
            client.close()


def test_a_large_state_goes_in_sections_of_a_mebibyte(tmp_path):
    state = bytes(range(251)) * (5 * MIB // 251) + b"the end"
    one, other = both(tmp_path, STOP_COPY, STOP_COPY, state)
    with one as source, other as destination:
        from_client, to_client = source.connect(), destination.connect()
        from_client.set_mig_state(SC)
        stream = b"".join(save(from_client))
        assert kernel_bytes(stream) == MAGIC + b"=" + len(state).to_bytes(8, "little") + state
        assert set(source.driver.read_sizes) == {MIB}
        to_client.set_mig_state(RES)
        load(to_client, [stream[at : at + 700_001] for at in range(0, len(stream), 700_001)])
        to_client.set_mig_state(R)
        assert destination.driver.state == state
        from_client.close()
        to_client.close()


def test_a_plain_program_takes_our_bytes(tmp_path):
    one, other = both(tmp_path)
    with one as source, other as destination:
        client = source.connect()
        client.set_mig_state(P)
        stream = b"".join(save_early(client))
        client.set_mig_state(SC)
        stream += b"".join(save(client))
        client.close()
        plain = kernel_bytes(stream)

        fd = destination.plain(RES)
        for at in range(0, len(plain), 100):
            destination.kernel.kernel.write(fd, memoryview(plain[at : at + 100]))
        destination.plain(R)
        os.close(fd)
        assert destination.driver.state == STATE


def test_we_take_the_bytes_of_a_plain_program(tmp_path):
    one, other = both(tmp_path)
    with one as source, other as destination:
        fd = source.plain(SC)
        plain = b"".join(iter(lambda: source.kernel.kernel.read(fd, 1000), b""))
        os.close(fd)
        template = stream_of(destination)  # header and config space are the destination's own
        client = destination.connect()
        client.set_mig_state(RES)
        load(client, [with_kernel_bytes(template, [plain[:5], plain[5:]])])
        client.set_mig_state(R)
        assert destination.driver.state == STATE
        client.close()


def with_kernel_bytes(stream: bytes, pieces: list[bytes]) -> bytes:
    """The stream with other bytes of a driver in it."""
    header, *items = StreamReader(crc32c).push(stream)
    writer = StreamWriter(header, crc32c)
    out = [writer.begin()]
    for item in items:
        if isinstance(item, StreamSection) and item.origin is Origin.SERVER:
            out += writer.section(item.section, Origin.SERVER)
    for piece in pieces:
        out += writer.section(Section(TAG, SECTION_VERSION, piece), Origin.PLUGIN)
    return b"".join([*map(bytes, out), writer.end()])


def test_pre_copy_goes_on_while_there_is_more(tmp_path):
    one, other = both(tmp_path)
    with one as source, other as destination:
        client, to_client = source.connect(), destination.connect()
        to_client.set_mig_state(RES)
        client.set_mig_state(P)
        head = b"".join(save_early(client))
        assert MAGIC in head
        assert refusal(client.mig_data_read) == errno.ENOMSG
        info = client.precopy_info()
        assert (info.initial_bytes, info.dirty_bytes) == (0, 0)
        load(to_client, [head])
        for number in range(3):
            source.driver.change(b"change %d" % number)
            eventually(lambda: client.precopy_info().dirty_bytes, "nothing dirty is told")
            load(to_client, save_early(client))
        client.set_mig_state(SC)
        load(to_client, save(client))
        to_client.set_mig_state(R)
        assert destination.driver.state == b"change 2" + STATE[8:]
        client.close()
        to_client.close()


def test_driver_that_answers_nothing_with_no_bytes(tmp_path):
    with served(tmp_path / "root", ALL, STATE) as function:
        function.driver.end_of_pre_copy = 0
        client = function.connect()
        client.set_mig_state(P)
        assert MAGIC in b"".join(save_early(client))
        assert refusal(client.mig_data_read) == errno.ENOMSG
        client.set_mig_state(SC)
        list(save(client))
        client.close()


def test_cancelled_pre_copy_and_another_one(tmp_path):
    with served(tmp_path / "root", ALL, STATE) as function:
        client = function.connect()
        for _ in range(3):
            client.set_mig_state(P)
            client.mig_data_read(10)
            client.set_mig_state(R)
            assert function.driver.mig_state is R
        client.set_mig_state(P)
        stream = b"".join(save_early(client))
        client.set_mig_state(PP)
        client.set_mig_state(P)
        client.set_mig_state(SC)
        stream += b"".join(save(client))
        assert kernel_bytes(stream) == MAGIC + b"=" + len(STATE).to_bytes(8, "little") + STATE
        client.close()


def test_new_first_pass_is_told_once_to_a_client_that_asked(tmp_path):
    with served(tmp_path / "root", ALL, STATE) as function:
        client = function.connect()
        client.set_mig_state(P)
        list(save_early(client))
        function.driver.begin_anew()
        assert not client.precopy_info().reinit  # it has not asked for flags
        client.feature_set(Feature.MIG_PRECOPY_INFO)
        function.driver.begin_anew()
        assert client.precopy_info().reinit
        assert not client.precopy_info().reinit
        client.close()


def test_read_that_blocks_in_the_driver_holds_nothing_up_and_loses_nothing(tmp_path):
    with served(tmp_path / "root", ALL, STATE) as function:
        driver, client = function.driver, function.connect()
        gate = driver.slow["read"] = threading.Event()
        client.set_mig_state(P)
        assert driver.entered.wait(5)
        early = client.mig_data_read()  # the stream's header
        assert refusal(client.mig_data_read) == errno.ENOMSG
        client.set_mig_state(SC)  # while the read is still under way
        gate.set()
        stream = early + b"".join(save(client))
        assert kernel_bytes(stream) == MAGIC + b"=" + len(STATE).to_bytes(8, "little") + STATE
        client.close()


def test_slow_read_in_stop_copy_is_bridged(tmp_path):
    with served(tmp_path / "root", STOP_COPY, STATE) as function:
        driver, client = function.driver, function.connect()
        gate = driver.slow["read"] = threading.Event()
        client.set_mig_state(SC)
        stream = client.mig_data_read()
        assert driver.entered.wait(5)
        padding = client.mig_data_read()  # after a second
        while b"padding" not in padding:
            padding += client.mig_data_read()
        gate.set()
        stream += padding + b"".join(save(client))
        assert kernel_bytes(stream).endswith(STATE)
        client.close()


# --- failures of data


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMSG, errno.ENODEV])
def test_read_that_fails_fails_the_save_and_the_source_runs_on(tmp_path, number):
    with served(tmp_path / "root", ALL, STATE) as function:
        driver, client = function.driver, function.connect()
        driver.fail_read = number
        client.set_mig_state(SC)
        assert b"VFUSTATE" in client.mig_data_read()
        seen = 0
        while not seen:
            seen = refusal(client.mig_data_read)
        assert seen == (errno.EIO if number == errno.ENOMSG else number)
        driver.fail_read = 0
        client.set_mig_state(R)
        assert driver.mig_state is R
        client.set_mig_state(SC)
        assert kernel_bytes(b"".join(save(client))).endswith(STATE)
        client.close()


def test_pre_copy_that_fails_keeps_the_device_running(tmp_path):
    with served(tmp_path / "root", ALL, STATE) as function:
        driver, client = function.driver, function.connect()
        driver.fail_read = errno.EIO
        client.set_mig_state(P)
        seen = 0
        while seen in (0, errno.ENOMSG):
            seen = refusal(client.mig_data_read)
        assert seen == errno.EIO
        assert refusal(client.set_mig_state, SC) == errno.EIO
        assert client.mig_state() is driver.mig_state is P
        client.set_mig_state(R)
        assert driver.mig_state is R
        client.close()


def stream_of(function) -> bytes:
    client = function.connect()
    client.set_mig_state(SC)
    stream = b"".join(save(client))
    client.close()
    return stream


def test_write_that_the_driver_refuses_refuses_the_load_until_a_reset(tmp_path, caplog):
    one, other = both(tmp_path)
    with one as source, other as destination:
        stream = stream_of(source)
        client = destination.connect()
        destination.driver.fail_write = len(MAGIC)
        client.set_mig_state(RES)
        with pytest.raises(ReplyError) as failed:
            load(
                client,
                itertools.chain([stream[at : at + 64] for at in range(0, len(stream), 64)], itertools.repeat(b"")),
            )
        assert failed.value.errno == errno.EINVAL
        assert refusal(client.set_mig_state, R) == errno.EINVAL
        assert client.mig_state() is destination.driver.mig_state is RES
        assert "the driver did not take the state" in caplog.text
        client.reset()
        destination.driver.fail_write = 0
        client.set_mig_state(RES)
        load(client, [stream])
        client.set_mig_state(R)
        assert destination.driver.state == STATE
        client.close()


def test_state_that_the_driver_does_not_accept_in_the_end(tmp_path, caplog):
    one, other = both(tmp_path)
    with one as source, other as destination:
        source.driver._whole = lambda: b"nonsense"
        stream = stream_of(source)
        client = destination.connect()
        client.set_mig_state(RES)
        load(client, [stream])
        assert refusal(client.set_mig_state, R) == errno.EINVAL
        assert client.mig_state() is destination.driver.mig_state is RES
        assert f"after {len(MAGIC) + 8} bytes of state" in caplog.text
        client.reset()
        assert client.mig_state() is destination.driver.mig_state is R
        assert destination.driver.state == bytes(len(STATE))
        client.close()


def test_driver_that_breaks_over_a_state(tmp_path):
    one, other = both(tmp_path)
    with one as source, other as destination:
        stream = stream_of(source)
        client = destination.connect()
        client.set_mig_state(RES)
        load(client, [stream])
        destination.driver.breaks = {S}
        assert refusal(client.set_mig_state, R) == errno.EIO
        assert client.mig_state() is MigState.ERROR
        client.reset()
        assert client.mig_state() is destination.driver.mig_state is R
        client.close()


def test_state_of_another_driver_is_refused_by_the_header(tmp_path, caplog):
    one, other = both(tmp_path)
    with one as source, other as destination:
        stream = stream_of(source)
        destination.device._variant = "other_vfio_pci"
        client = destination.connect()
        client.set_mig_state(RES)
        seen = refusal(load, client, [stream]) or refusal(client.set_mig_state, R)
        assert seen == errno.EINVAL
        cause = "'fake_vfio_pci', this device has 'other_vfio_pci'"
        eventually(lambda: cause in caplog.text, cause, 30.0)  # the write that it refuses is answered first
        assert destination.driver.file.queue == b""
        client.close()


def test_sizes(tmp_path):
    with served(tmp_path / "root", ALL, STATE) as function:
        client = function.connect()
        assert client.mig_data_size() >= len(MAGIC) + len(STATE)
        function.driver.has_size = False
        assert refusal(client.mig_data_size) == errno.ENOTTY
        assert refusal(client.precopy_info) == errno.EINVAL
        client.set_mig_state(PP)
        assert client.precopy_info().initial_bytes >= len(MAGIC)
        client.close()


def test_paths_of_the_server_and_of_the_kernel_are_one():
    for flags in FLAG_SETS:
        for source, target in itertools.product(sorted(states(flags)), MigState):
            try:
                walked = list(path(flags, source, target))
            except VfuServerError:
                walked = None
            assert walked == way(flags, source, target)
