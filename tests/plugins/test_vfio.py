"""The plugin for any function: who is asked, what it declares of regions, and what a function without reset becomes."""

import logging
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import trio_test

import plugins.vfio
from plugins.vfio.device import PlainFunction, device_for, parse_options
from plugins.vfio.layout import MsixTable, msix_table, policy_of
from tests.plugins.fake_host import FakeEdu, FakeHost
from vfu_server.device import SavePhase, Section, StopKind
from vfu_server.errors import HostError, StateError, UsageError
from vfu_server.host_device import MmapArea, RegionInfo
from vfu_server.migration import migration_flags
from vfu_server.plugins import AUTO, Plugins
from vfu_server.policy import Answer
from vfu_server.region import MmapMode, compile_rules, mmap_areas
from vfu_server.uapi import REGION_INFO_FLAG_MMAP, REGION_INFO_FLAG_READ, REGION_INFO_FLAG_WRITE

MAPPABLE = REGION_INFO_FLAG_READ | REGION_INFO_FLAG_WRITE | REGION_INFO_FLAG_MMAP
PAGE = 4096


def bar(index: int, size: int, flags: int = MAPPABLE) -> RegionInfo:
    mapped = bool(flags & REGION_INFO_FLAG_MMAP)
    return RegionInfo(index, size, flags, (MmapArea(0, size),) if mapped else (), 9 if mapped else -1, index << 40)


def with_msix(count: int, region: int, offset: int, at: int = 0x70, following: int = 0) -> bytes:
    header = bytearray(256)
    header[0x06], header[0x34] = 0x10, 0x50
    header[0x50:0x52] = bytes((0x01, at))
    struct.pack_into("<BBHII", header, at, 0x11, following, count - 1 | 0x8000, offset | region, 0x3000 | region)
    return bytes(header)


# --- who is asked


def test_auto_never_asks_it() -> None:
    known, unknown = FakeEdu(), FakeHost()
    assert [one.plugin.name for one in Plugins().probe(AUTO, known, {})] == ["generic_dmaq"]
    assert Plugins().probe(AUTO, unknown, {}) == []


@pytest.mark.parametrize("host", [FakeEdu(), FakeHost()])
@trio_test
async def test_by_name_it_takes_anything_and_changes_nothing(host: FakeHost) -> None:
    before = bytes(host.config)
    (taken,) = Plugins().probe("vfio", host, {})
    assert isinstance(taken.device, PlainFunction)
    assert (bytes(host.config), host.writes) == (before, [])


@pytest.mark.parametrize("options", [{"profile": "edu"}, {"without-reset": "maybe"}, {"without-reset": ""}])
def test_options_are_checked(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="without-reset"):
        Plugins().probe("vfio", FakeHost(), options)
    with pytest.raises(UsageError, match="without-reset"):
        plugins.vfio.vfu_server_describe(options)


def test_the_example_is_a_policy_that_can_be_meant() -> None:
    described = plugins.vfio.vfu_server_describe({})
    ((policy, sizes),) = described["policies"].values()
    policy.check(sizes)
    assert list(policy.gaps(sizes)) == []
    assert "--plugin vfio" in described["summary"]


# --- regions


def test_msix_table_is_found_where_it_is() -> None:
    assert msix_table(with_msix(65, 4, 0x2000)) == MsixTable(4, 0x2000, 65 * 16)
    assert msix_table(bytes(256)) is None
    looping = with_msix(1, 0, 0)[:0x70] + bytes((0x05, 0x50)) + bytes(256 - 0x72)
    assert msix_table(looping) is None


@given(st.binary(min_size=0, max_size=256))
@settings(max_examples=200, deadline=None)
def test_any_config_space_is_survived(header: bytes) -> None:
    table = msix_table(header + bytes(4096 - len(header)))
    assert table is None or (table.region < 8 and 16 <= table.size <= 2048 * 16)


def test_mapped_all_but_the_table() -> None:
    regions = [bar(0, 0x20000), bar(1, 0), bar(2, 0x20, 3), bar(4, 0x4000), RegionInfo(6, 0x800, 1), bar(7, 4096)]
    policy = policy_of(regions, MsixTable(4, 0x1800, 0x900))
    assert mmap_areas(policy, regions, MmapMode.ALL) == {
        0: (MmapArea(0, 0x20000),),
        4: (MmapArea(0, 0x1000), MmapArea(0x3000, 0x1000)),
    }
    for mode in (MmapMode.PLUGIN, MmapMode.NEVER):
        assert mmap_areas(policy, regions, mode) == {}
    names = [(rule.region, rule.start, rule.end, rule.name) for rule in policy.rules]
    assert names == [
        (0, 0, 0x20000, "registers"),
        (2, 0, 0x20, "registers"),
        (4, 0, 0x1000, "registers"),
        (4, 0x1000, 0x3000, "MSI-X table"),
        (4, 0x3000, 0x4000, "registers"),
        (6, 0, 0x800, "ROM"),
    ]


PLACES = st.integers(0, 0x5000).map(lambda at: at & ~7)
TABLES = st.builds(MsixTable, st.integers(0, 7), PLACES, st.integers(1, 2048).map(lambda count: count * 16))


@given(
    st.lists(st.integers(0, 0x9000), min_size=6, max_size=6), st.lists(st.booleans(), min_size=6, max_size=6), TABLES
)
@settings(max_examples=200, deadline=None)
def test_every_byte_of_any_function_is_covered(
    sizes: tuple[int, ...], flags: tuple[bool, ...], table: MsixTable
) -> None:
    each = enumerate(zip(sizes, flags, strict=True))
    regions = [bar(index, size, MAPPABLE if mapped else 3) for index, (size, mapped) in each]
    policy = policy_of(regions, table)
    by_index = {region.index: region.size for region in regions if region.size}
    assert list(policy.gaps(by_index)) == []
    areas = mmap_areas(policy, regions, MmapMode.ALL)
    compile_rules(policy, MmapMode.ALL, by_index, areas)
    for region, mapped in areas.items():
        assert flags[region]
        for area in mapped:
            assert area.offset % PAGE == area.size % PAGE == 0
            assert area.offset + area.size <= sizes[region]
            inside = area.offset < table.offset + table.size and table.offset < area.offset + area.size
            assert not (inside and region == table.region)


def test_nothing_reaches_the_hardware_unless_it_runs() -> None:
    policy = policy_of([bar(0, 0x4000), bar(2, 0x20, 3), RegionInfo(6, 0x800, 1)], None)
    assert {(rule.read.running, rule.write.running) for rule in policy.rules} == {
        (Answer.MMAP, Answer.MMAP),
        (Answer.PASS, Answer.PASS),
    }
    for rule in policy.rules:
        for answers in (rule.read, rule.write):
            assert {answers.stopped, answers.resuming, answers.error} == {Answer.DISCARD}


# --- reset and migration


@trio_test
async def test_reset_is_the_functions_own() -> None:
    host = FakeHost()
    host.can_reset = True
    await device_for(host, serve_unreset=parse_options({"without-reset": "serve"})).reset()
    assert host.resets == 1
    host.reset_error = HostError("it did not come back")
    with pytest.raises(HostError, match="did not come back"):
        await device_for(host).reset()


@trio_test
async def test_function_without_reset_is_kept_from_the_next_client_unless_the_operator_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = FakeHost()
    host.reset_error = HostError("there is no reset")
    with pytest.raises(HostError, match="there is no reset"):
        await device_for(host).reset()
    with caplog.at_level(logging.WARNING):
        await device_for(host, serve_unreset=parse_options({"without-reset": "serve"})).reset()
    assert "as it was left" in caplog.text


@trio_test
async def test_no_migration_and_it_says_why() -> None:
    device = device_for(FakeHost())
    can = device.capabilities
    assert (can.migratable, migration_flags(can)) == (False, 0)
    assert "kernel driver" in can.reason

    class Nowhere:
        async def send(self, section: Section) -> None:
            raise AssertionError("it saved something")

    for refused in (
        device.stop(StopKind.FULL),
        device.start(StopKind.FULL),
        device.save(SavePhase.STOP_COPY, Nowhere()),
        device.load(Section("x", 1, b"")),
        device.load_done(),
    ):
        with pytest.raises(StateError, match="cannot be migrated"):
            await refused
