"""The access policy of any function, and which of its physical function's functions a device is."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugins.mlx5
from plugins.mlx5.policy import MsixTable, msix_table, policy_of
from plugins.mlx5.registers import INIT_SEGMENT
from plugins.mlx5.vf_index import index_of
from tests.plugins.mlx5.firmware import FakeConnectx
from tests.plugins.mlx5.virtual import FakeVf
from vfu_server.errors import HostError
from vfu_server.host_device import MmapArea, RegionInfo
from vfu_server.policy import Answer, StateClass
from vfu_server.region import MmapMode, compile_rules, mmap_areas
from vfu_server.uapi import REGION_INFO_FLAG_MMAP

PAGE = 4096


def bar(size, *, mapped=True):
    return RegionInfo(0, size, 7 if mapped else 3, (MmapArea(0, size),) if mapped else (), 9 if mapped else -1)


@given(st.integers(1, 64), st.booleans(), st.integers(0, 0x40000).map(lambda at: at & ~7), st.integers(1, 2048))
@settings(max_examples=150, deadline=None)
def test_every_byte_is_covered_and_only_doorbells_are_mapped(pages, mapped, at, vectors):
    region = bar(pages * PAGE, mapped=mapped)
    table = MsixTable(0, at, vectors * 16)
    policy = policy_of([region], table, p2p=True)
    assert list(policy.gaps({0: region.size})) == []
    for mode in (MmapMode.PLUGIN, MmapMode.ALL):
        areas = mmap_areas(policy, [region], mode)
        compile_rules(policy, mode, {0: region.size}, areas)
        for area in areas.get(0, ()):
            assert mapped
            assert area.offset >= 3 * PAGE
            end = area.offset + area.size
            assert end <= at // PAGE * PAGE or area.offset >= min(at + vectors * 16, end + 1)


def test_a_doorbell_in_p2p_is_kept_and_all_ones_are_never_read_from_the_segment_of_a_stopped_function():
    policy = policy_of([bar(0x10000)], None, p2p=True)
    rules = {
        name: [rule for rule in policy.rules if rule.name == name] for name in {rule.name for rule in policy.rules}
    }
    assert set(rules) == {"initialization segment", "reserved", "doorbells"}
    (doorbells,) = rules["doorbells"]
    assert (doorbells.start, doorbells.end) == (3 * PAGE, 0x10000)
    for state in (StateClass.P2P, StateClass.STOPPED):
        assert doorbells.write[state] == Answer.MMAP
    for segment in rules["initialization segment"]:
        for state in (StateClass.P2P, StateClass.STOPPED):
            assert (segment.read[state], segment.write[state]) == (Answer.SHADOW, Answer.SHADOW)
        assert segment.read.running == segment.write.running == Answer.PASS
        assert segment.write.resuming == Answer.DISCARD
    assert REGION_INFO_FLAG_MMAP & 7
    # every register is kept, and not much else: each eight bytes are a read while the guest waits
    kept = {at for rule in rules["initialization segment"] for at in range(rule.start, rule.end)}
    assert {at for register in INIT_SEGMENT for at in range(register.offset, register.end)} <= kept
    assert len(kept) // 8 < 64


def test_without_a_way_there_is_no_p2p_and_the_policy_says_why():
    policy = policy_of([bar(0x10000)], None, p2p=False)
    assert not policy.p2p
    assert "suspend" in policy.p2p_reason


def test_the_described_example_can_be_meant():
    described = plugins.mlx5.vfu_server_describe({})
    ((policy, sizes),) = described["policies"].values()
    policy.check(sizes)
    assert list(policy.gaps(sizes)) == []


def test_a_trace_names_registers_as_the_device_means_them():
    registers = plugins.mlx5.vfu_server_describe({})["registers"]["connectx-vf"][0]
    assert registers.decode(0x1FC, 0x00000080) == "initializing 0x80000000 [initializing]"
    assert registers.decode(0x18, 0x01000000) == "cmd_doorbell 0x00000001"


@given(st.binary(max_size=256))
@settings(max_examples=100, deadline=None)
def test_any_config_space_is_survived(header):
    msix_table(header + bytes(4096 - len(header)))


# --- which function it is


def pair(pf_name, vf_name, *, first=2, stride=1, count=8):
    pf = FakeConnectx(pf_name)
    struct.pack_into("<I", pf.config, 0x100, 0x10 | 1 << 16)
    struct.pack_into("<HHHH", pf.config, 0x110, count, 0, first, stride)
    return pf, FakeVf(pf, vf_name)


def test_the_index_follows_from_the_addresses():
    assert index_of(*pair("0000:3b:00.0", "0000:3b:00.2"), None) == 0
    assert index_of(*pair("0000:3b:00.0", "0000:3b:00.5"), None) == 3
    assert index_of(*pair("0000:3b:00.1", "0000:3b:01.0", first=5, stride=2), 1) == 1
    for names in (("0000:3b:00.0", "0000:3b:00.1"), ("0000:3b:00.0", "0001:3b:00.2"), ("0000:3b:00.0", "0000:3c:00.0")):
        with pytest.raises(HostError, match="is no virtual function of"):
            index_of(*pair(*names), None)
    with pytest.raises(HostError, match="is virtual function 0 of"):
        index_of(*pair("0000:3b:00.0", "0000:3b:00.2"), 1)


def test_behind_sockets_it_is_said_or_the_first():
    assert index_of(FakeConnectx("/run/a.pf"), FakeVf(FakeConnectx(), "/run/a"), None) == 0
    assert index_of(FakeConnectx("/run/a.pf"), FakeVf(FakeConnectx(), "/run/a"), 5) == 5
    assert plugins.mlx5.vfu_server_companions("0000:3b:00.2", {"pf": "0000:3b:00.0"}) == ["0000:3b:00.0"]
    assert plugins.mlx5.vfu_server_companions("/run/a", {"pf": "pf"}) == []
    assert plugins.mlx5.vfu_server_companions("0000:3b:00.2", {}) == []
