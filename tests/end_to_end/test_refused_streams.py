"""State that must not be loaded, through real servers: refused by name, and nothing is lost on either side.

The client is answered an errno, the log names the error and its cause, the destination stays stopped and a reset brings
it back; the source goes on.
"""

import errno
import random

import pytest

from tests.end_to_end.ioat_driver import IoatDriver
from tests.end_to_end.streams import parts_of, records_of
from vfu_server.testing import EduDriver, ReplyError, load, migrate, pci, save
from vfu_server.testing.edu import REG_LIVENESS
from vfu_server.uapi import MigState

GUARD = 0x600D600D


@pytest.fixture(scope="module")
def edu(edu_source, edu_stream):
    """One guest for all tests: each of them ends with its device reset and at work."""
    with edu_source.connect() as guest:
        yield guest.start()


@pytest.fixture(scope="module")
def edu_stream(edu_source):
    """An edu's state as its server gives it."""
    with edu_source.connect() as guest:
        driver = EduDriver(guest.start())
        driver.write32(REG_LIVENESS, 0x1111)
        guest.memory.write(0x1000, random.Random(5).randbytes(4096))
        driver.copy_to_device(0x1000, 4096)
        guest.client.set_mig_state(MigState.STOP_COPY)
        return b"".join(save(guest.client))


@pytest.fixture(scope="module")
def ioat_stream(ioat_source):
    """An I/OAT's state."""
    with ioat_source.connect() as guest:
        guest.start().enable_msix(2)
        driver = IoatDriver(guest)
        driver.set_up()
        driver.copy([(0x100000, 0x200000, 4096)] * 3)
        guest.client.set_mig_state(MigState.STOP_COPY)
        return b"".join(save(guest.client))


def give(client, data):
    load(client, [data[at : at + 4096] for at in range(0, len(data), 4096)])
    client.set_mig_state(MigState.RUNNING)


def refused(server, guest, data, error, *words, code=errno.EINVAL):
    """`data` is refused as it should be, and the device is none the worse for it."""
    server.forget()
    client = guest.client
    driver = EduDriver(guest)
    driver.write32(REG_LIVENESS, GUARD)
    client.set_mig_state(MigState.RESUMING)
    assert server.model.control("clear") == {}
    with pytest.raises(ReplyError) as caught:
        give(client, data)
    assert caught.value.errno == code
    for state in (MigState.RUNNING, MigState.STOP):
        with pytest.raises(ReplyError) as again:
            client.set_mig_state(state)
        assert again.value.errno == code, "the first fault is the answer to every further wish"
    assert client.mig_state() == MigState.RESUMING
    with pytest.raises(ReplyError):
        client.mig_data_write(b"more")
    said = server.said()
    assert f"{error}: " in said, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert not writes(server), "no register is written before all is known to be right"
    client.reset()
    assert client.mig_state() == MigState.RUNNING
    works(guest)


def writes(server):
    return [row for row in server.model.control("accesses")["counts"] if row["region"] == 0 and row["write"]]


def works(guest):
    pci.place_bars(guest.config, guest.bars)
    driver = EduDriver(guest)
    assert driver.read32(REG_LIVENESS) == 0, "as after a reset"
    assert driver.factorial(5) == 120
    guest.memory.write(0x3000, b"works again")
    driver.copy_to_device(0x3000, 11)
    driver.copy_from_device(0x5000, 11)
    assert guest.memory.read(0x5000, 11) == b"works again"


# another device, plugin, version: sums are right


def test_another_devices_state_into_edu(edu_source, edu, ioat_stream):
    words = ("the state is of another device: vendor 0x8086 (here: 0x1234), device 0x2f20 (here: 0x11e8)",)
    refused(edu_source, edu, ioat_stream, "StreamMismatchError", *words)


def test_edus_state_into_another_device(ioat_source, ioat, edu_stream):
    ioat_source.forget()
    client = ioat.client
    client.set_mig_state(MigState.RESUMING)
    with pytest.raises(ReplyError) as caught:
        give(client, edu_stream)
    assert caught.value.errno == errno.EINVAL
    assert client.mig_state() == MigState.RESUMING
    said = ioat_source.said()
    assert "StreamMismatchError: the state is of another device: vendor 0x1234 (here: 0x8086)" in said
    client.reset()
    assert client.mig_state() == MigState.RUNNING
    pci.place_bars(ioat.config, ioat.bars)
    ioat.enable_msix(2)
    driver = IoatDriver(ioat)
    driver.set_up()
    driver.copy([(0x100000, 0x200000, 64)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plugin": "mlx5"}, "plugin mlx5 (here: generic_dmaq)"),
        ({"state_version": 2}, "the state was saved for state_version 2, this device has 1"),
        ({"variant": "ioat"}, "the state was saved for variant 'ioat', this device has 'edu'"),
        ({"features": 3}, "saved with 3 queues, this device has 2"),
        ({"vendor": 0x1235}, "vendor 0x1235 (here: 0x1234)"),
        ({"device": 0x11E9}, "device 0x11e9 (here: 0x11e8)"),
        ({"subsystem_vendor": 1}, "subsystem vendor 0x1 (here: 0x1af4)"),
        ({"subsystem": 1}, "subsystem 0x1 (here: 0x1100)"),
        ({"revision": 0x11}, "revision 0x11 (here: 0x10)"),
        ({"class_code": 0x020000}, "class code 0x20000 (here: 0xff00)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_identity(edu_source, edu, edu_stream, changes, words):
    refused(edu_source, edu, parts_of(edu_stream).with_header(**changes).data(), "StreamMismatchError", words)


def test_the_identity_is_refused_before_a_byte_of_state_is_asked_for(edu_source, edu, edu_stream):
    """In a migration with PRE_COPY that is before the source is stopped."""
    edu_source.forget()
    stranger = parts_of(edu_stream).with_header(plugin="other").data()
    header = records_of(stranger)[0][1]
    edu.client.set_mig_state(MigState.RESUMING)
    with pytest.raises(ReplyError) as caught:
        edu.client.mig_data_write(stranger[:header])
    assert caught.value.errno == errno.EINVAL
    edu_source.wait_log("StreamMismatchError")
    edu.client.reset()
    works(edu)


# sections that nobody's writer gives: sums are right


@pytest.mark.parametrize(
    ("order", "error", "words"),
    [
        ([0, 1, 2], "StreamFormatError", "the state ends without memory"),
        ([0, 1, 3], "StreamFormatError", "the state ends without registers"),
        ([1, 2, 3], "StreamFormatError", "the stream has no section config"),
        ([0, 2, 1, 3], "StreamFormatError", "section 'registers' came before 'device'"),
        ([0, 0, 1, 2, 3], "StreamFormatError", "section config came twice"),
        ([0, 1, 2, 2, 3], "StreamFormatError", "section 'registers' came twice"),
        ([0, 1, 2, 3, 3], "StreamFormatError", "section 'memory' came twice"),
        ([], "StreamFormatError", "the stream has no section config"),
    ],
    ids=str,
)
def test_sections_left_out_doubled_and_reordered(edu_source, edu, edu_stream, order, error, words):
    parts = parts_of(edu_stream)
    assert parts.tags == ["config", "device", "registers", "memory"]
    refused(edu_source, edu, parts.with_sections(order).data(), error, words)


def cut(payload):
    return payload[:-1]


@pytest.mark.parametrize(
    ("tag", "change", "fields", "error", "words"),
    [
        ("config", cut, {}, "StreamFormatError", "255 bytes of config space, this device has 256"),
        ("config", lambda p: p[:0x3D] + b"\2" + p[0x3E:], {}, "StreamFormatError", "0x2 at 0x3d, this device has 0x1"),
        ("config", bytes, {"version": 2}, "StreamFormatError", "section 'config' (version 2, server's), which may not"),
        ("device", cut, {}, "StreamFormatError", "bytes of registers, not"),
        ("device", lambda p: b"X" + p[1:], {}, "StreamFormatError", "the header begins with b'XMAQ'"),
        ("device", lambda p: p[:-8] + b"\xee" + p[-7:], {}, "StreamMismatchError", "identification is 0x10000ed here"),
        ("registers", cut, {}, "StreamFormatError", "bytes of registers, not 16 for each of"),
        ("registers", lambda p: p + bytes(16), {}, "StreamFormatError", "bytes of registers, not 16 for each of"),
        ("registers", lambda p: p[16:32] + p[:16] + p[32:], {}, "StreamFormatError", "stands where"),
        ("registers", bytes, {"tag": "registerz"}, "StreamFormatError", "unknown section 'registerz'"),
        ("memory", cut, {}, "StreamFormatError", "the memory section has 4095 bytes, not 4096"),
        ("memory", lambda p: p + b"!", {}, "StreamFormatError", "the memory section has 4097 bytes, not 4096"),
        ("memory", bytes, {"version": 2}, "StreamFormatError", "unknown section 'memory' version 2"),
        ("config", bytes, {"version": 2}, "StreamFormatError", "section 'config'"),
        ("config", bytes, {"version": 0}, "StreamFormatError", "section 'config'"),
    ],
)
def test_sections_with_other_contents(edu_source, edu, edu_stream, tag, change, fields, error, words):
    data = parts_of(edu_stream).with_section(tag, change, **fields).data()
    refused(edu_source, edu, data, error, words)


def test_register_values_that_no_guest_can_bring_about(edu_source, edu, edu_stream):
    """A factorial that no input gives: found before the hardware is touched."""
    parts = parts_of(edu_stream)
    (registers,) = [part.section.payload for part in parts.sections if part.section.tag == "registers"]
    at = next(n for n in range(0, len(registers), 16) if registers[n + 4 : n + 8] == (8).to_bytes(4, "little"))
    wrong = registers[: at + 8] + (7).to_bytes(8, "little") + registers[at + 16 :]
    data = parts.with_section("registers", lambda _: wrong).data()
    refused(edu_source, edu, data, "StreamFormatError", "factorial 0x7 is the result of no input")


# bytes that were damaged on the way


def test_cut_after_each_record(edu_source, edu, edu_stream):
    for _, end in records_of(edu_stream)[:-1]:
        refused(edu_source, edu, edu_stream[:end], "StreamFormatError", "found the end of the data")


@pytest.mark.parametrize("at", [0, 1, 11, 12, 200, -29, -1])
def test_cut_within(edu_source, edu, edu_stream, at):
    refused(edu_source, edu, edu_stream[:at], "StreamFormatError", "found the end of the data")


@pytest.mark.parametrize("more", [b"\0", b"DONE", bytes(64)], ids=len)
def test_left_over_bytes(edu_source, edu, edu_stream, more):
    refused(edu_source, edu, edu_stream + more, "StreamFormatError", "expected nothing behind the end record")


def test_twice_the_stream(edu_source, edu, edu_stream):
    refused(edu_source, edu, edu_stream * 2, "StreamFormatError", "expected nothing behind the end record")


@pytest.mark.parametrize("how", ["doubled", "dropped", "swapped"])
def test_records_doubled_dropped_and_swapped(edu_source, edu, edu_stream, how):
    places = records_of(edu_stream)
    pieces = [edu_stream[start:end] for start, end in places]
    for n in range(1, len(pieces) - 1):
        changed = list(pieces)
        if how == "doubled":
            changed.insert(n, pieces[n])
        elif how == "dropped":
            del changed[n]
        else:
            changed[n], changed[n + 1] = changed[n + 1], changed[n]
        refused(edu_source, edu, b"".join(changed), "StreamFormatError", "device state stream, byte ")


def test_records_of_another_stream_of_the_same_device(edu_source, edu, edu_stream):
    """Each fits where it is put but for the sums, which bind it to what came before it."""
    other = parts_of(edu_stream).with_section("config", lambda payload: payload[:0xC] + b"\x10" + payload[0xD:]).data()
    (_, _, *places, _) = records_of(edu_stream)
    assert records_of(other)[2:-1] == places
    for start, end in places:
        mixed = other[:start] + edu_stream[start:end] + other[end:]
        refused(edu_source, edu, mixed, "StreamFormatError", f"byte {start + 44}: expected", "with the sum")


def test_one_changed_byte_anywhere(edu_source, edu, edu_stream):
    """A sample through the real server; each byte in turn is in test_every_byte.py."""
    chance = random.Random(0)
    places = {start + offset for start, end in records_of(edu_stream) for offset in (0, 9, (end - start) // 2)}
    for at in sorted(places | {len(edu_stream) - 1}):
        flipped = edu_stream[at] ^ (1 << chance.randrange(8))
        data = edu_stream[:at] + bytes([flipped]) + edu_stream[at + 1 :]
        refused(edu_source, edu, data, "StreamFormatError", "device state stream, byte ")


# the other side


def test_the_source_of_a_refused_state_goes_on(edu_target, edu, ioat_arrival):
    driver = EduDriver(edu)
    driver.write32(REG_LIVENESS, 0x77)
    edu.memory.write(0x1000, b"stays at the source")
    driver.copy_to_device(0x1000, 19)
    with pytest.raises(ReplyError) as caught:
        migrate(edu.client, ioat_arrival.client)
    assert caught.value.errno == errno.EINVAL
    assert "the source runs again" in caught.value.__notes__
    assert edu.client.mig_state() == MigState.RUNNING
    assert driver.read32(REG_LIVENESS) == 0x77 ^ 0xFFFFFFFF
    driver.copy_from_device(0x6000, 19)
    assert edu.memory.read(0x6000, 19) == b"stays at the source"
    assert driver.factorial(7) == 5040


def test_a_refused_destination_takes_the_right_state_after_its_reset(edu_source, edu, edu_stream):
    refused(edu_source, edu, edu_stream[:-1], "StreamFormatError")
    edu.client.set_mig_state(MigState.RESUMING)
    load(edu.client, [edu_stream])
    edu.client.set_mig_state(MigState.RUNNING)
    driver = EduDriver(edu)
    assert driver.read32(REG_LIVENESS) == 0x1111 ^ 0xFFFFFFFF
    driver.copy_from_device(0x8000, 4096)
    assert edu.memory.read(0x8000, 4096) == random.Random(5).randbytes(4096)
    edu.client.reset()
    works(edu)
