"""The layouts against bytes that were made elsewhere, and against each other for any numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.mlx5.models import commands_eswitch, messages
from plugins.mlx5.models.caps import LAYOUTS, PLACES, Capabilities
from plugins.mlx5.models.layouts import Layout, bits, raw, u32, u64
from plugins.mlx5.models.queue import xor
from tests.plugins.mlx5_model.raw import create_mkey, hexes, put
from tests.plugins.mlx5_model.raw import xor as plain_xor
from vfu_server.errors import PluginError

ALL = sorted(
    {
        (f"{module.__name__}.{name}", found)
        for module in (messages, commands_eswitch)
        for name, found in vars(module).items()
        if isinstance(found, Layout)
    }
    | {(f"caps.{layout.name}", layout) for layout in LAYOUTS.values()},
    key=lambda pair: pair[0],
)


def spread(size: int, *parts: tuple[int, str]) -> bytes:
    data = bytearray(size)
    for at, text in parts:
        piece = hexes(text)
        data[at : at + len(piece)] = piece
    return bytes(data)


VECTORS = [
    (
        messages.QUERY_HCA_CAP,
        {"opcode": 0x100, "op_mod": 1, "other_function": 1, "function_id": 1},
        hexes("01000000 00000001 80000001 00000000"),
    ),
    (
        messages.QUERY_HCA_CAP,
        {"opcode": 0x100, "op_mod": 0x40, "other_function": 1, "function_id": 1},
        hexes("01000000 00000040 80000001 00000000"),
    ),
    (messages.SUSPEND_VHCA, {"opcode": 0x115, "vhca_id": 0x123}, hexes("01150000 00000000 00000123 00000000")),
    (
        messages.SUSPEND_VHCA,
        {"opcode": 0x115, "op_mod": 1, "vhca_id": 0x123},
        hexes("01150000 00000001 00000123 00000000"),
    ),
    (
        messages.RESUME_VHCA,
        {"opcode": 0x116, "op_mod": 1, "vhca_id": 0x123},
        hexes("01160000 00000001 00000123 00000000"),
    ),
    (
        messages.QUERY_MIGRATION,
        {"opcode": 0x117, "incremental": 1, "chunk": 1, "vhca_id": 0x123},
        hexes("01170000 00000000 c0000123 00000000"),
    ),
    (
        messages.QUERY_MIGRATION_OUT,
        {"migration_state": 3, "required_umem_size": 0x800000, "remaining_total_size": 0x123456789},
        spread(0x40, (0, "00000000 00000000 00000000 30000000"), (0x10, "00800000 00000000 00000001 23456789")),
    ),
    (
        messages.SAVE_VHCA_STATE,
        {"opcode": 0x118, "set_track": 1, "vhca_id": 0x123, "mkey": 0xABCD00, "size": 0x200000},
        hexes("01180000 00000000 40000123 00000000 00000000 00000000 00abcd00 00200000"),
    ),
    (
        messages.SAVE_VHCA_STATE_OUT,
        {"actual_image_size": 0x1FF123, "next_required_umem_size": 0x800000},
        hexes("00000000 00000000 001ff123 00800000"),
    ),
    (
        messages.LOAD_VHCA_STATE,
        {"opcode": 0x119, "vhca_id": 0x123, "mkey": 0xABCD00, "size": 0x12345},
        hexes("01190000 00000000 00000123 00000000 00000000 00000000 00abcd00 00012345"),
    ),
    (
        messages.CREATE_MKEY,
        {
            "opcode": 0x200,
            "access_mode_1_0": 1,
            "rw": 1,
            "rr": 1,
            "lw": 1,
            "lr": 1,
            "qpn": 0xFFFFFF,
            "pd": 0xBEEF,
            "len": 0x2000,
            "translations_octword_size": 1,
            "log_page_size": 12,
            "translations_octword_actual_size": 1,
        },
        spread(
            0x110,
            (0, "02000000"),
            (0x10, "00003d00 ffffff00 00000000 0000beef"),
            (0x2C, "00002000"),
            (0x44, "00000001 0000000c"),
            (0x60, "00000001"),
        ),
    ),
    (
        messages.MANAGE_PAGES,
        {"opcode": 0x108, "op_mod": 1, "function_id": 1, "num_entries": 2},
        hexes("01080000 00000001 00000001 00000002"),
    ),
    (
        messages.CREATE_PAGE_TRACK,
        {
            "opcode": 0xA00,
            "op_mod": 0x46,
            "vhca_id": 0x123,
            "track_type": 1,
            "log_addr_space_size": 32,
            "log_page_size": 12,
            "log_msg_size": 19,
            "reporting_qpn": 0x4D,
            "num_ranges": 1,
        },
        spread(0x40, (0, "0a000000 00000046"), (0x18, "00000123"), (0x20, "01200c13 0000004d 00000001")),
    ),
    (
        messages.MODIFY_PAGE_TRACK,
        {
            "opcode": 0xA01,
            "op_mod": 0x46,
            "obj_id": 7,
            "modify_field_select": 3,
            "state": 1,
            "range_start_address": 0x40000000,
            "range_length": 0x10000000,
        },
        spread(
            0x40,
            (0, "0a010000 00000046 00000007"),
            (0x14, "00000003"),
            (0x20, "10000000"),
            (0x34, "40000000"),
            (0x3C, "10000000"),
        ),
    ),
    (
        messages.EQE,
        {"type": 0x0B, "data": 0x00000001_00000010 << 160},
        spread(0x40, (0, "000b0000"), (0x20, "00000001 00000010")),
    ),
]


@pytest.mark.parametrize(("layout", "values", "expected"), VECTORS, ids=lambda found: getattr(found, "name", ""))
def test_bytes_are_those_of_the_documents(layout, values, expected):
    assert layout.pack(values) == expected
    found = layout.unpack(expected)
    assert {name: value for name, value in found.items() if value} == values
    assert layout.strays(expected) == []


def test_the_tests_own_driver_agrees():
    """The exerciser's way of making messages gives the same bytes."""
    made = create_mkey(0xBEEF, 0x2000, [0x100200000, 0x100201000])
    assert made[:0x110] == VECTORS[10][2]
    assert made[0x110:] == hexes("00000001 00200000 00000001 00201000")
    assert put(16, (0, 16, 0x115), (4, 0, 1), (8, 0, 0x123)) == VECTORS[3][2]


def test_signatures_are_those_of_the_documents():
    entry = spread(
        64,
        (0, "07000000 00000010"),
        (0x10, "01150000 00000000 00000123"),
        (0x38, "00000010 5a950001"),
    )
    assert xor(entry) == plain_xor(entry) == 0xFF
    second = spread(
        64,
        (0, "07000000 00000120 00000001 00300000"),
        (0x10, "02000000"),
        (0x38, "00000010 5ba00001"),
    )
    assert xor(second) == 0xFF
    mailbox = spread(576, (0x23C, "005ba4af"))  # number 0, no next one, token, signatures
    mailbox = create_mkey(0xBEEF, 0x2000, [0x100200000, 0x100201000])[16:].ljust(512, b"\0") + mailbox[512:]
    assert xor(mailbox[0x200:0x23F]) == 0xFF
    assert xor(mailbox) == 0xFF


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=700))
def test_folding_is_the_same_as_one_byte_after_another(data):
    assert xor(data) == plain_xor(data)


@pytest.mark.parametrize(("name", "layout"), ALL, ids=[name for name, _ in ALL])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_values_come_back(name, layout, data):
    values = {field: data.draw(st.integers(0, layout.limit(field)), label=field) for field in layout}
    message = layout.pack(values)
    assert len(message) == layout.size
    assert layout.unpack(message) == values
    assert layout.strays(message) == []


@pytest.mark.parametrize(("name", "layout"), ALL, ids=[name for name, _ in ALL])
def test_every_bit_is_a_field_or_a_stray(name, layout):
    """Each bit of a message changes exactly one field, or is reported with its dword."""
    for bit in range(0, 8 * layout.size, 1 if layout.size <= 0x40 else 13):
        message = bytearray(layout.size)
        message[bit // 8] = 0x80 >> bit % 8
        fields = [field for field, value in layout.unpack(bytes(message)).items() if value]
        strays = layout.strays(bytes(message))
        assert len(fields) + len(strays) == 1
        assert strays in ([], [bit // 32 * 4])


def test_all_ones_are_reported_once_for_each_dword():
    layout = Layout("test", 16, u32("a", 4), bits("b", 8, 7, 0))
    assert layout.strays(b"\xff" * 16) == [0, 8, 12]


@pytest.mark.parametrize(
    "fields",
    [
        (u32("a", 0), bits("b", 0, 3)),
        (u32("a", 0), u32("a", 4)),
        (u32("a", 16),),
        (u64("a", 12),),
        (raw("a", 10, 7),),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(fields):
    with pytest.raises(PluginError):
        Layout("test", 16, *fields)


def test_values_that_do_not_fit_are_refused():
    layout = Layout("test", 16, bits("a", 0, 3, 0))
    for values in ({"a": 16}, {"a": -1}, {"b": 0}):
        with pytest.raises(PluginError):
            layout.pack(values)


def test_capabilities_are_where_the_documents_have_them():
    """Some of the bits that drivers look at, as bytes of the block."""
    caps = Capabilities(vhca_id=0x1F, vf=False, changes={})
    general, second = caps.block(0, 1), caps.block(0x20, 1)
    assert general[0xD1] & 0x04  # migration
    assert general[4] & 0x80  # there is a second block
    assert general[6:8] == b"\0\x1f"  # VHCA id
    assert general[3] & 1  # manages others
    assert general[0xAF] & 0x40  # page tracker
    assert second[0x3F] & 0x40  # its object type
    assert second[0x18:0x1C] == bytes([0x00, 0xC0, 0x80, 0x40])
    assert len(PLACES) == sum(len(list(layout)) for layout in LAYOUTS.values())
