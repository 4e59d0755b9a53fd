"""Layouts against the literal bytes of the interface's description, and against themselves by property."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.mlx5 import contexts, layouts
from plugins.mlx5.bits import Layout, bits, table, whole
from plugins.mlx5.mailboxes import STRIDE, Chain, blocks_for, entry, xor8
from plugins.mlx5.records import stop_copy_size
from vfu_server.errors import PluginError


def message(size, parts):
    data = bytearray(size)
    for at, text in parts.items():
        piece = bytes.fromhex(text)
        data[at : at + len(piece)] = piece
    return bytes(data)


VECTORS = [
    (
        layouts.QUERY_HCA_CAP,
        1,
        {"other_function": 1, "function_id": 1},
        b"",
        message(0x10, {0: "01000000 00000001 80000001 00000000"}),
    ),
    (
        layouts.QUERY_HCA_CAP,
        0x40,
        {"other_function": 1, "function_id": 1},
        b"",
        message(0x10, {0: "01000000 00000040 80000001 00000000"}),
    ),
    (layouts.SUSPEND_VHCA, 0, {"vhca_id": 0x123}, b"", message(0x10, {0: "01150000 00000000 00000123"})),
    (layouts.SUSPEND_VHCA, 1, {"vhca_id": 0x123}, b"", message(0x10, {0: "01150000 00000001 00000123"})),
    (layouts.RESUME_VHCA, 1, {"vhca_id": 0x123}, b"", message(0x10, {0: "01160000 00000001 00000123"})),
    (
        layouts.QUERY_VHCA_MIGRATION_STATE,
        0,
        {"incremental": 1, "chunk": 1, "vhca_id": 0x123},
        b"",
        message(0x10, {0: "01170000 00000000 c0000123"}),
    ),
    (
        layouts.SAVE_VHCA_STATE,
        0,
        {"set_track": 1, "vhca_id": 0x123, "mkey": 0xABCD00, "size": 0x200000},
        b"",
        message(0x20, {0: "01180000 00000000 40000123 00000000 00000000 00000000 00abcd00 00200000"}),
    ),
    (
        layouts.LOAD_VHCA_STATE,
        0,
        {"vhca_id": 0x123, "mkey": 0xABCD00, "size": 0x12345},
        b"",
        message(0x20, {0: "01190000 00000000 00000123 00000000 00000000 00000000 00abcd00 00012345"}),
    ),
    (
        layouts.CREATE_MKEY,
        0,
        {
            "access_mode_1_0": 1,
            "rw": 1,
            "rr": 1,
            "lw": 1,
            "lr": 1,
            "qpn": 0xFFFFFF,
            "pd": 0xBEEF,
            "len": 0x2000,
            "translations_octword_size": 1,
            "translations_octword_actual_size": 1,
            "log_page_size": 12,
        },
        bytes.fromhex("00000001 00200000 00000001 00201000"),
        message(
            0x120,
            {
                0: "02000000",
                0x10: "00003d00 ffffff00 00000000 0000beef",
                0x2C: "00002000",
                0x44: "00000001 0000000c",
                0x60: "00000001",
                0x110: "00000001 00200000 00000001 00201000",
            },
        ),
    ),
    (
        layouts.MANAGE_PAGES,
        1,
        {"function_id": 1, "count": 2},
        bytes.fromhex("00000001 00400000 00000001 00401000"),
        message(0x20, {0: "01080000 00000001 00000001 00000002 00000001 00400000 00000001 00401000"}),
    ),
    (
        layouts.CREATE_OBJECT,
        0x46,
        {
            "vhca_id": 0x123,
            "track_type": 1,
            "log_addr_space_size": 32,
            "log_page_size": 12,
            "log_msg_size": 19,
            "reporting_qpn": 0x4D,
            "num_ranges": 1,
        },
        bytes(8) + (1 << 32).to_bytes(8, "big"),
        message(0x50, {0: "0a000000 00000046", 0x18: "00000123", 0x20: "01200c13 0000004d 00000001", 0x48: "00000001"}),
    ),
    (
        layouts.MODIFY_OBJECT,
        0x46,
        {"obj_id": 7, "modify_field_select": 3, "state": 1, "range_start_address": 0x40000000, "length": 0x10000000},
        b"",
        message(
            0x40,
            {
                0: "0a010000 00000046 00000007",
                0x14: "00000003",
                0x20: "10000000",
                0x34: "40000000",
                0x3C: "10000000",
            },
        ),
    ),
]


@pytest.mark.parametrize(("command", "op_mod", "fields", "tail", "expected"), VECTORS)
def test_messages_are_the_literal_ones(command, op_mod, fields, tail, expected):
    assert command.encode(op_mod, tail, **fields).hex(" ", 4) == expected.hex(" ", 4)


def test_answers_are_read_from_the_literal_ones():
    query = message(0x40, {0xC: "30000000 00800000 00000000 00000001 23456789"})
    found = layouts.QUERY_VHCA_MIGRATION_STATE.output.decode(query)
    assert (found["migration_state"], found["required_umem_size"]) == (3, 0x800000)
    assert found["remaining_total_size"] == 0x123456789
    saved = layouts.SAVE_VHCA_STATE.output.decode(message(0x10, {8: "001ff123 00800000"}))
    assert (saved["actual_image_size"], saved["next_required_umem_size"]) == (0x1FF123, 0x800000)
    event = message(0x40, {0: "000b0000", 0x20: "00000001 00000010"})
    assert contexts.EQE.decode(event) == {
        "type": 0x0B,
        "sub_type": 0,
        "ec_function": 0,
        "release_all": 0,
        "func_id": 1,
        "num_pages": 16,
        "signature": 0,
        "owner": 0,
    }


def test_entries_are_the_literal_ones():
    suspend = layouts.SUSPEND_VHCA.encode(0, vhca_id=0x123)
    expected = message(64, {0: "07000000 00000010", 0x10: "01150000 00000000 00000123", 0x38: "00000010 5a950001"})
    assert entry(suspend, 16, 0x5A, 0, 0) == expected
    command, op_mod, fields, tail, built = VECTORS[8]
    expected = message(64, {0: "07000000 00000120 00000001 00300000", 0x10: "02000000", 0x38: "00000010 5ba00001"})
    assert entry(command.encode(op_mod, tail, **fields), 16, 0x5B, 0x100300000, 0) == expected
    assert xor8(expected) == 0xFF
    for signed, end in ((True, "005ba4af"), (False, "005b0000")):
        memory = memoryview(bytearray(2 * STRIDE))
        Chain(memory, 0x100300000).fill(built, 0x5B, signed=signed)
        assert bytes(memory[0x23C:0x240]).hex() == end
        assert bytes(memory[:0x110]) == built[16:]
        assert not any(memory[0x200:0x23C])


def test_the_stream_opens_with_the_literal_record():
    assert stop_copy_size(0x200000).hex(" ", 4) == "08000000 00000000 01000000 01000000 00002000 00000000"


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_message_gives_back_what_was_put_in(data):
    command = data.draw(st.sampled_from(sorted(layouts.COMMANDS.values(), key=lambda c: c.opcode)))
    for layout in (command.input, command.output):
        values = {one.name: data.draw(st.integers(0, (1 << one.width) - 1)) for one in layout.fields}
        built = layout.encode(values)
        assert len(built) == layout.size
        assert layout.decode(built) == values
        assert int.from_bytes(built, "big").bit_count() == sum(value.bit_count() for value in values.values())


@given(st.integers(0, 5000), st.integers(1, 255), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_chain_carries_messages_of_any_length(length, token, signed):
    sent = bytes(n * 7 & 0xFF for n in range(length))
    memory = memoryview(bytearray(STRIDE * 12))
    chain = Chain(memory, 0x10000)
    chain.fill(sent, token, signed=signed)
    assert chain.take(sent[:16], length) == sent
    for number in range(blocks_for(length)):
        box = bytes(memory[number * STRIDE : number * STRIDE + 576])
        last = number + 1 == blocks_for(length)
        assert int.from_bytes(box[0x230:0x238], "big") == (0 if last else 0x10000 + (number + 1) * STRIDE)
        assert box[0x23D] == token
        if signed:
            assert (xor8(box[0x200:0x23F]), xor8(box)) == (0xFF, 0xFF)


@pytest.mark.parametrize(
    "fields",
    [
        (bits("a", 0, 7, 0), bits("b", 0, 8, 7)),
        (whole("a", 4, 8),),
        (bits("a", 0, 7, 0), bits("a", 0, 15, 8)),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(fields):
    with pytest.raises(PluginError):
        Layout("wrong", 8, fields)


def test_a_row_says_where_a_field_is():
    layout = table("t", 0x20, "a @0x0[31:16]\n b @0x4[3]\n c @0x8\n d @0x10+6")
    assert layout == Layout("t", 0x20, (bits("a", 0, 31, 16), bits("b", 4, 3, 3), bits("c", 8), whole("d", 0x10, 6)))


@pytest.mark.parametrize(
    "row", ["a", "a 0x4", "a @4", "a @0x4[]", "a @0x4[1:2:3]", "a @0x4[3]+8", "a @0x4 b", "a @0x8"]
)
def test_a_row_that_says_nothing_is_refused(row):
    with pytest.raises(PluginError):
        table("wrong", 8, row)


def test_what_does_not_fit_is_refused():
    with pytest.raises(PluginError, match="does not fit"):
        layouts.SUSPEND_VHCA.encode(0, vhca_id=1 << 16)
    with pytest.raises(PluginError, match="no field"):
        layouts.SUSPEND_VHCA.encode(0, vf=1)
    with pytest.raises(PluginError, match="end before"):
        layouts.SAVE_VHCA_STATE.output.get(bytes(8), "actual_image_size")
