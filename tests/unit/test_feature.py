"""DEVICE_FEATURE requests: the kernel's order of errors, the wire's layouts, hostile sizes."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfu_server.device import PrecopyInfo
from vfu_server.errors import ClientError
from vfu_server.feature import (
    MAX_LOGGING_RANGES,
    Offer,
    data_size_reply,
    logging_report_reply,
    logging_start_reply,
    migration_reply,
    parse_feature,
    parse_logging_report,
    parse_logging_start,
    precopy_info_reply,
    state_reply,
    wanted_state,
)
from vfu_server.uapi import Feature, MigState

GET, SET, PROBE = 0x10000, 0x20000, 0x40000
EVERYTHING = Offer(migration_flags=7, dma_logging=True)
NOTHING = Offer()

# id: ways, bytes that argsz must leave room for; as in the kernel's header, but for GET of 12
TABLE = {
    1: (GET, 8),
    2: (GET | SET, 8),
    6: (SET, 16),
    7: (SET, 0),
    8: (GET, 24),
    9: (GET, 8),
    12: (GET | SET, {GET: 24, SET: 0}),
}
SENT = {(2, SET): 8, (6, SET): 16, (8, GET): 24}


def message(feature, ways, data=b"", argsz=None, room=0):
    if argsz is None:
        argsz = 8 + max(len(data), room)
    return struct.pack("<II", argsz, feature | ways) + data


def refusal(payload, offer=EVERYTHING):
    with pytest.raises(ClientError) as refused:
        parse_feature(payload, offer)
    return refused.value.errno


def kernel_errno(feature, ways, argsz, sent, offer):
    """The order of drivers/vfio/vfio_main.c, vfio_ioctl_device_feature and vfio_check_feature; 0: taken."""
    if argsz < 8 or ways & ~(GET | SET | PROBE):
        return errno.EINVAL
    if ways == GET | SET:
        return errno.EINVAL
    if feature == 12 and not offer.migration_flags & 4:
        return errno.EINVAL
    here = (feature in (1, 2, 9, 12) and offer.migration_flags) or (feature in (6, 7, 8) and offer.dma_logging)
    if not here:
        return errno.ENOTTY
    allowed, needed = TABLE[feature]
    if ways & (GET | SET) & ~allowed:
        return errno.EINVAL
    if ways & PROBE:
        return 0
    if not ways & (GET | SET) or argsz - 8 < (needed[ways & (GET | SET)] if isinstance(needed, dict) else needed):
        return errno.EINVAL
    if sent < SENT.get((feature, ways), 0):  # on the wire the data must have come as well
        return errno.EINVAL
    return 0


@given(
    feature=st.one_of(st.integers(0, 13), st.integers(0, 0xFFFF)),
    ways=st.one_of(
        st.sampled_from([0, GET, SET, GET | SET, PROBE, PROBE | GET, PROBE | SET, PROBE | GET | SET]),
        st.integers(0, 0xFFFF).map(lambda high: high << 16),
    ),
    argsz=st.integers(0, 64),
    sent=st.integers(0, 64),
    offer=st.builds(Offer, st.sampled_from([0, 1, 3, 5, 7]), st.booleans()),
)
def test_errors_come_in_the_kernels_order(feature, ways, argsz, sent, offer):
    payload = message(feature, ways, bytes(sent), argsz)
    expected = kernel_errno(feature, ways, argsz, min(sent, max(0, argsz - 8)), offer)
    if expected:
        assert refusal(payload, offer) == expected
        return
    request = parse_feature(payload, offer)
    assert request.feature == feature
    assert (request.get, request.set, request.probe) == (bool(ways & GET), bool(ways & SET), bool(ways & PROBE))
    assert request.argsz == argsz
    assert request.data == payload[8:argsz]


@pytest.mark.parametrize("feature", range(14))
def test_each_way_of_each_feature(feature):
    ways, room = TABLE.get(feature, (0, 0))
    for way in (GET, SET):
        for probe in (0, PROBE):
            payload = message(feature, way | probe, bytes(24), 8 + 24)
            if feature not in TABLE:
                assert refusal(payload) == errno.ENOTTY
            elif ways & way:
                assert parse_feature(payload, EVERYTHING).feature == feature
            else:
                assert refusal(payload) == errno.EINVAL
    if feature in TABLE:
        assert parse_feature(message(feature, PROBE), EVERYTHING).probe
        assert refusal(message(feature, 0)) == errno.EINVAL
        way = GET if ways & GET else SET
        if isinstance(room, dict):
            room = room[way]
        if room:
            assert refusal(message(feature, way, bytes(room), 8 + room - 1)) == errno.EINVAL
        assert refusal(message(feature, way, bytes(room)), NOTHING) == (errno.EINVAL if feature == 12 else errno.ENOTTY)


def test_a_message_shorter_than_its_header():
    for length in range(8):
        assert refusal(bytes(length)) == errno.EINVAL


def test_a_way_is_asked_of_a_feature_that_is_not_there():
    assert refusal(message(1, SET, bytes(8)), NOTHING) == errno.ENOTTY
    assert refusal(message(1, SET, bytes(8)), EVERYTHING) == errno.EINVAL
    assert refusal(message(1, 0), NOTHING) == errno.ENOTTY
    assert refusal(message(999, GET | SET), NOTHING) == errno.EINVAL


def test_pre_copy_info_without_pre_copy_is_einval_as_in_the_kernel():
    assert refusal(message(12, SET), Offer(migration_flags=3)) == errno.EINVAL
    assert refusal(message(12, PROBE), Offer()) == errno.EINVAL
    assert parse_feature(message(12, SET), Offer(migration_flags=5)).reply() == message(12, SET)


@pytest.mark.parametrize(
    ("info", "with_flags", "flags", "sizes"),
    [
        (PrecopyInfo(1 << 20, 4096), True, 0, (1 << 20, 4096)),
        (PrecopyInfo(5, 6, reinit=True), True, 1, (5, 6)),
        (PrecopyInfo(5, 6, reinit=True), False, 0, (5, 6)),
        (PrecopyInfo(-1, 1 << 64), False, 0, (0, (1 << 64) - 1)),
    ],
)
def test_pre_copy_info_is_the_kernels_struct(info, with_flags, flags, sizes):
    request = parse_feature(message(12, GET, room=24), EVERYTHING)
    reply = precopy_info_reply(request, info, with_flags=with_flags)
    assert reply == struct.pack("<IIIIQQ", 32, 12 | GET, 24, flags, *sizes)


def test_the_documented_vectors_of_a_state_change():
    request = parse_feature(bytes.fromhex("10000000 02000200 03000000 ffffffff"), EVERYTHING)
    assert (request.feature, request.set, wanted_state(request)) == (Feature.MIG_DEVICE_STATE, True, 3)
    assert state_reply(request, MigState.STOP_COPY).hex() == "10000000020002000300 0000ffffffff".replace(" ", "")


def test_get_needs_no_data_but_room():
    request = parse_feature(message(2, GET, b"", 16), EVERYTHING)
    assert state_reply(request, MigState.RUNNING_P2P) == struct.pack("<IIIi", 16, 2 | GET, 5, -1)
    request = parse_feature(message(1, GET, b"", 16), EVERYTHING)
    assert migration_reply(request, 7) == struct.pack("<IIQ", 16, 1 | GET, 7)
    request = parse_feature(message(9, GET, b"", 4096), EVERYTHING)
    assert data_size_reply(request, 123456) == struct.pack("<IIQ", 16, 9 | GET, 123456)
    assert data_size_reply(request, -5) == struct.pack("<IIQ", 16, 9 | GET, 0)
    assert data_size_reply(request, 1 << 70) == struct.pack("<IIQ", 16, 9 | GET, (1 << 64) - 1)


def test_any_state_number_is_handed_on():
    for number in (0, 7, 8, 0xFFFFFFFF):
        assert wanted_state(parse_feature(message(2, SET, struct.pack("<Ii", number, 5)), EVERYTHING)) == number


def test_a_probe_and_a_set_are_answered_with_their_own_bytes():
    for payload in (message(2, PROBE | GET | SET), message(7, SET), message(1, PROBE | GET, b"junk")):
        assert parse_feature(payload, EVERYTHING).reply() == payload


# --- DMA logging


def start(page_size, ranges, count=None, tail=b""):
    data = struct.pack("<QII", page_size, len(ranges) if count is None else count, 0)
    data += b"".join(struct.pack("<QQ", *item) for item in ranges) + tail
    return parse_feature(message(6, SET, data), EVERYTHING)


def start_refusal(*args, **kwargs):
    with pytest.raises(ClientError) as refused:
        parse_logging_start(start(*args, **kwargs))
    return refused.value.errno


def test_start_as_qemu_builds_it():
    request = start(0x1000, [(0, 0xFEBFC000)])
    parsed = parse_logging_start(request)
    assert (parsed.page_size, parsed.ranges) == (0x1000, ((0, 0xFEBFC000),))
    reply = logging_start_reply(request, 0x200000)
    assert reply[:8] == struct.pack("<II", request.argsz, 6 | SET)
    assert struct.unpack("<QIIQQ", reply[8:]) == (0x200000, 1, 0, 0, 0xFEBFC000)


def test_start_without_ranges_is_everything():
    assert parse_logging_start(start(0x1000, [])).ranges == ()


@pytest.mark.parametrize("page_size", [0, 1, 2048, 4095, 4097, 0x3000, (1 << 64) - 1])
def test_start_and_report_want_a_power_of_two_of_at_least_a_page(page_size):
    assert start_refusal(page_size, []) == errno.EINVAL
    request = parse_feature(message(8, GET, struct.pack("<QQQ", 0, 1 << 30, page_size), room=1 << 20), EVERYTHING)
    with pytest.raises(ClientError) as refused:
        parse_logging_report(request, 1 << 20)
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0x800, 0x1000)], errno.EINVAL),
        ([(0x1000, 0x800)], errno.EINVAL),
        ([(0x1000, 0)], errno.EINVAL),
        ([(0x1000, 0x2000), (0x2000, 0x1000)], errno.EINVAL),
        ([(0x5000, 0x1000), (0x1000, 0x1000), (0x4000, 0x2000)], errno.EINVAL),
        ([((1 << 64) - 0x1000, 0x1000)], errno.EOVERFLOW),
        ([((1 << 64) - 0x1000, 0x2000)], errno.EOVERFLOW),
        ([(0x1000, (1 << 64) - 0x1000)], errno.EOVERFLOW),
    ],
)
def test_start_refuses_ranges_as_the_kernel_does(ranges, expected):
    assert start_refusal(0x1000, ranges) == expected


def test_start_takes_as_many_ranges_as_the_kernel():
    most = [(i * 0x2000, 0x1000) for i in range(MAX_LOGGING_RANGES)]
    assert len(most) == 256
    assert parse_logging_start(start(0x1000, most[::-1])).ranges == tuple(most[::-1])
    assert start_refusal(0x1000, [*most, (1 << 40, 0x1000)]) == errno.E2BIG
    touching = ((0x1000, 0x1000), (0x2000, 0x2000), (0, 0x1000))
    assert parse_logging_start(start(0x1000, touching)).ranges == touching
    assert start_refusal(0x1000, [], count=0xFFFFFFFF) == errno.E2BIG


def test_start_whose_ranges_did_not_come():
    assert start_refusal(0x1000, [(0, 0x1000)], count=2) == errno.EINVAL
    assert start_refusal(0x1000, [(0, 0x1000)], count=2, tail=bytes(15)) == errno.EINVAL
    assert parse_logging_start(start(0x1000, [(0, 0x1000)], tail=b"behind")).ranges == ((0, 0x1000),)


def report(iova, length, page_size, argsz, max_bitmap=1 << 20):
    request = parse_feature(message(8, GET, struct.pack("<QQQ", iova, length, page_size), argsz), EVERYTHING)
    return request, parse_logging_report(request, max_bitmap)


@pytest.mark.parametrize(
    ("length", "page_size", "size"),
    [
        (0x1000, 0x1000, 8),
        (1, 0x1000, 8),
        (64 << 12, 0x1000, 8),
        ((64 << 12) + 1, 0x1000, 16),
        (1 << 40, 1 << 21, 65536),
    ],
)
def test_report_and_its_reply(length, page_size, size):
    request, parsed = report(0x100000, length, page_size, 8 + 24 + size)
    assert (parsed.iova, parsed.length, parsed.page_size, parsed.bitmap_size) == (0x100000, length, page_size, size)
    reply = logging_report_reply(request, bytearray(b"\xa5" * size))
    assert reply == struct.pack("<IIQQQ", 32 + size, 8 | GET, 0x100000, length, page_size) + b"\xa5" * size
    with pytest.raises(ClientError) as refused:
        report(0x100000, length, page_size, 8 + 24 + size - 1)
    assert refused.value.errno == errno.EINVAL
    assert report(0x100000, length, page_size, 8 + 24 + size, max_bitmap=size)[1] == parsed


@pytest.mark.parametrize(
    ("iova", "length", "max_bitmap", "expected"),
    [
        (0, 0, 1 << 20, errno.EINVAL),
        ((1 << 64) - 0x1000, 0x1000, 1 << 20, errno.EOVERFLOW),
        (0x1000, (1 << 64) - 1, 1 << 20, errno.EOVERFLOW),
        (0, (1 << 64) - 1, 1 << 20, errno.E2BIG),
        (0, 1 << 40, 1 << 20, errno.E2BIG),
        (0, 65 << 12, 8, errno.E2BIG),
    ],
)
def test_report_refuses(iova, length, max_bitmap, expected):
    with pytest.raises(ClientError) as refused:
        report(iova, length, 0x1000, 0xFFFFFFFF, max_bitmap)
    assert refused.value.errno == expected
