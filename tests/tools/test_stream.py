"""`vfu-stream`: what it prints of a state, what it finds wrong, and how it ends."""

import struct
import subprocess
import sys

import pytest

from tests.tools.conftest import tool
from vfu_server import uapi
from vfu_server.device import Section, StateIdentity
from vfu_server.host_device import Identity
from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import Origin, StreamHeader, StreamWriter
from vfu_server.tools.stream import run

DEVICE = Identity(0x1234, 0x11E8, 0x1AF4, 0x1100, 0x10, 0x00FF00)


def config():
    space = bytearray(256)
    struct.pack_into("<HHHH", space, 0, 0x1234, 0x11E8, 0x0406, uapi.PCI_STATUS_CAP_LIST)
    struct.pack_into("<I", space, uapi.PCI_BASE_ADDRESS_0, 0xFEA00000)
    space[uapi.PCI_INTERRUPT_LINE] = 11
    space[uapi.PCI_CAPABILITY_LIST] = 0x40
    space[0x40], space[0x41] = uapi.PCI_CAP_ID_MSI, 0x40  # a list that loops
    return Section("config", 1, bytes(space))


def stream(*sections, plugin="generic_dmaq", variant="edu", padding_at=(), config_section=None, end=True):
    writer = StreamWriter(StreamHeader(plugin, "1.0", StateIdentity(variant, 1), DEVICE), crc32c)
    data = writer.begin()
    data += b"".join(writer.section(config_section or config(), Origin.SERVER))
    for number, section in enumerate(sections):
        if number in padding_at:
            data += b"".join(writer.padding(64))
        data += b"".join(writer.section(section, Origin.PLUGIN))
    return data + (writer.end() if end else b"")


RECORD = struct.Struct("<BBHIQ")
EDU_DEVICE = Section(
    "device", 1, struct.pack("<4sHHIII", b"DMAQ", 1, 1, 2, 4096, 1) + RECORD.pack(0, 4, 0, 0, 0x10000ED)
)
EDU_REGISTERS = Section("registers", 1, RECORD.pack(0, 4, 0, 4, 0x1234) + RECORD.pack(0, 4, 0, 0x3C, 7))
EDU_MEMORY = Section("memory", 1, bytes(4096))


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "state.bin"
        path.write_bytes(data)
        return str(path)

    return write


def test_a_state_is_printed_section_by_section(file, capsys):
    data = stream(EDU_DEVICE, EDU_REGISTERS, EDU_MEMORY, padding_at=[1])
    assert run(["inspect", file(data)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "format 1, plugin generic_dmaq 1.0"
    assert lines[1] == "state of edu, version 1, features 0x0"
    assert lines[2] == "device 1234:11e8 subsystem 1af4:1100 revision 10 class 00ff00"
    sections = [line for line in lines if line.startswith("byte")]
    assert [line.split(": ", 1)[1] for line in sections] == [
        "section 'config' (version 1, server's), 256 bytes; sums right",
        "section 'device' (version 1, plugin's), 36 bytes; sums right",
        "section 'padding' (version 0, server's), 64 bytes, optional, padding; sums right",
        "section 'registers' (version 1, plugin's), 32 bytes; sums right",
        "section 'memory' (version 1, plugin's), 4096 bytes; sums right",
    ]
    for line in sections:
        at = int(line.split()[1].rstrip(":"))
        assert data[at : at + 4] == b"SECT"
    assert lines[-1] == f"end: 5 sections in {len(data)} bytes, 1 of them padding; all sums right"
    text = "\n".join(lines)
    assert "    COMMAND 0x0406 (MEMORY MASTER INTX_DISABLE), STATUS 0x0010" in text
    assert "INTERRUPT_LINE 0x0b" in text
    assert "    BAR0 0xfea00000" in text
    assert text.count("capability MSI at 0x40") == 1
    assert "    profile edu: 2 registers, 4096 bytes of memory, 1 identity registers" in text
    assert "    BAR0 0x4 liveness 0x00001234" in text
    assert "    BAR0 0x3c (4 bytes) 0x7" in text


def test_verify_says_one_line(file, capsys):
    data = stream(EDU_DEVICE)
    assert run(["verify", file(data)]) == 0
    assert capsys.readouterr().out == f"2 sections in {len(data)} bytes, all sums right: edu (generic_dmaq)\n"


@pytest.mark.parametrize("action", ["inspect", "verify"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: data[:-1], "StreamFormatError: device state stream, byte "),
        (lambda data: data + b"x", "expected nothing behind the end record, found 1 bytes more"),
        (
            lambda data: data[:400] + bytes([data[400] ^ 1]) + data[401:],
            "StreamFormatError: device state stream, byte ",
        ),
        (lambda data: b"", "expected a header"),
        (lambda data: b"\x7fELF" + bytes(100), "expected the magic b'VFUSTATE', found b'\\x7fELF"),
        (lambda data: data[:8] + b"\x02" + data[9:], "expected format version 1, found 2"),
    ],
)
def test_what_is_not_sound_is_told_with_its_place(file, capsys, action, spoil, words):
    assert run([action, file(spoil(stream(EDU_DEVICE, EDU_REGISTERS)))]) == 1
    err = capsys.readouterr().err
    assert err.startswith("vfu-stream: error: ")
    assert words in err
    assert "Traceback" not in err


def test_what_was_sound_before_a_fault_is_printed(file, capsys):
    data = stream(EDU_DEVICE, EDU_REGISTERS)
    at = data.index(b"registers")
    assert run(["inspect", file(data[:at] + b"R" + data[at + 1 :])]) == 1
    out = capsys.readouterr().out
    assert "section 'device'" in out
    assert "profile edu" in out
    assert "'registers'" not in out


def test_a_section_that_is_cut_is_shown_as_not_complete(file, capsys):
    data = stream(EDU_MEMORY)
    assert run(["inspect", file(data[:-1000])]) == 1
    out, err = capsys.readouterr()
    assert "section 'memory' (version 1, plugin's), 4096 bytes; not complete" in out
    assert "expected the payload of section 'memory'" in err


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (stream(config_section=Section("config", 1, bytes(17))), "config space of 17 bytes, not 256 or 4096"),
        (stream(config_section=Section("config", 2, bytes(256))), "a required section of the server's"),
        (stream(config_section=Section("clock", 1, b"", optional=True)), "0 sections config of the server's, not 1"),
        (stream(Section("registers", 1, bytes(7))), "7 bytes of registers are not records of 16"),
        (stream(Section("device", 1, b"short")), "the header has 5 bytes, less than 20"),
        (stream(Section("queues", 1, b"")), "unknown section 'queues' version 1"),
    ],
)
def test_contents_that_cannot_be_are_named(file, capsys, data, words):
    assert run(["verify", file(data)]) == 1
    assert words in capsys.readouterr().err


def test_a_plugin_that_is_not_there_or_says_nothing(file, capsys):
    assert run(["inspect", file(stream(EDU_DEVICE, plugin="nowhere"))]) == 0
    assert "    not decoded: there is no plugin 'nowhere'; installed:" in capsys.readouterr().out
    assert run(["inspect", file(stream(EDU_DEVICE, plugin="vfio"))]) == 0
    assert "    the plugin 'vfio' does not tell what is in it" in capsys.readouterr().out


def test_registers_of_a_profile_that_is_not_shipped_are_shown_by_place(file, capsys):
    assert run(["inspect", file(stream(EDU_REGISTERS, variant="mine"))]) == 0
    assert "    BAR0 0x4 (4 bytes) 0x1234" in capsys.readouterr().out


def test_a_file_larger_than_memory_should_be(file, capsys):
    pages = [Section("memory", 1, bytes(15 << 20)) for _ in range(3)]
    assert run(["verify", file(stream(*pages))]) == 0


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    assert run(["verify", str(tmp_path / "none")]) == 3
    assert "none' cannot be read: No such file or directory" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path)]) == 3
    assert f"PlaceError: '{tmp_path}' cannot be read" in capsys.readouterr().err


def test_the_program(file):
    path = file(stream(EDU_DEVICE))
    assert tool("stream", "verify", path)[0] == 0
    assert tool("stream", "inspect", path)[1].startswith("format 1, plugin generic_dmaq 1.0\n")
    code, _, err = tool("stream", "look", path)
    assert (code, "vfu-stream: error: argument action: invalid choice" in err) == (2, True)
    assert tool("stream")[0] == 2
    code, out, _ = tool("stream", "--help")
    assert (code, "exit codes:" in out) == (0, True)


def test_a_reader_that_has_seen_enough(file):
    path = file(stream(*[EDU_REGISTERS] * 3000))
    command = [sys.executable, "-m", "vfu_server.tools.stream", "inspect", path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0
    with process.stderr:
        assert process.stderr.read() == b""
