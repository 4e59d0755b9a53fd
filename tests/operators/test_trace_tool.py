"""The whole way of a trace: taken by vfu-server, shown with register names, replayed against servers and models."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model_process import ModelProcess
from tests.server.programs import Server, environment, run
from vfu_server.errors import UsageError
from vfu_server.policy import Answer, StateClass
from vfu_server.testing import Client, EduDriver, Guest
from vfu_server.trace_file import TraceFile
from vfu_server.trace_format import Access, Kind, Mark, TraceHeader, TraceReader
from vfu_server.trace_replay import Ignored, parse_ignored
from vfu_server.trace_show import Printer
from vfu_server.uapi import RegionIndex

EDU = ("--plugin", "generic_dmaq", "--model", "edu")


def tool(*arguments, **extra):
    command = [sys.executable, "-P", "-m", "vfu_server.cli_trace", *map(str, arguments)]
    return subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A trace of a guest's driver at an edu model, and the log of the server that took it."""
    folder = tmp_path_factory.mktemp("t")
    trace = folder / "edu.trace"
    with Server(*EDU, "--socket-path", folder / "a.sock", "--trace-regions", folder / "%n.trace") as server:
        server.wait_log("listening at")
        with Guest.connect(folder / "a.sock") as guest:
            edu = EduDriver(guest.start())
            assert edu.liveness(0x1234) == 0xFFFFEDCB
            # Nothing whose answer depends on how far the device has come: the replay may find it further or less far.
            edu.use_intx()
            edu.raise_interrupt(0x10)
            edu.acknowledge(0x10)
        code, _ = server.end()
    assert code == 0
    return trace, server.log


def entries(path):
    with TraceReader.open(str(path)) as reader:
        return reader.header, list(reader.entries())


def test_trace_of_a_server_has_all_that_it_counted(taken):
    trace, log = taken
    header, found = entries(trace)
    assert (header.device, header.plugin, header.variant) == ("edu", "generic_dmaq", "edu")
    assert (header.vendor, header.device_id, header.mapped) == (0x1234, 0x11E8, ())
    accesses = [entry for entry in found if isinstance(entry, Access)]
    marks = [entry.kind for entry in found if isinstance(entry, Mark)]
    assert marks == [Kind.CLIENT, Kind.RESET, Kind.RESET]
    assert f"{trace} has {len(accesses)} accesses, 0 were lost" in log
    counted = re.search(r"statistics at the end .*accesses=\[running \[pass \[read (\d+), write (\d+)\]\]\]", log)
    assert counted is not None
    assert len(accesses) == int(counted[1]) + int(counted[2])
    assert trace.stat().st_mode & 0o777 == 0o600


def test_show_has_a_line_for_each_with_register_names(taken):
    trace, _ = taken
    shown = tool("show", trace)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    title, *lines = shown.stdout.splitlines()
    assert title.startswith("edu (1234:11e8), plugin generic_dmaq (edu), vfu-server 0.")
    assert len(lines) == len(entries(trace)[1])
    time = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    for pattern in (
        rf"^{time} -- a client has negotiated$",
        rf"^{time} -- the device was reset$",
        rf"^{time} w BAR0\+0x4 +4 0x00001234 +pass/running \d+\.\dus  liveness 0x00001234$",
        rf"^{time} r BAR0\+0x0 +4 0x010000ed +pass/running .*identification 0x010000ed \[major=0x1 magic=0xed\]$",
        rf"^{time} r CONFIG\+0x0 +256 3412e811[0-9a-f]*… pass/running",
    ):
        assert re.search(pattern, shown.stdout, re.MULTILINE), pattern


def test_show_as_json(taken):
    trace, _ = taken
    shown = tool("show", "--json", trace)
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    found = entries(trace)[1]
    assert len(records) == len(found)
    write = next(record for record in records if record.get("data") == "34120000")
    assert (write["direction"], write["region"], write["offset"], write["width"]) == ("write", 0, 4, 4)
    assert (write["answer"], write["class"], write["errno"]) == ("pass", "running", "")
    assert write["registers"] == "liveness 0x00001234"
    assert [record["mark"] for record in records if "mark" in record] == ["client", "reset", "reset"]


def test_plugin_that_is_not_here_is_told_and_names_are_left_out(taken, tmp_path):
    trace, _ = taken
    data = trace.read_bytes().replace(b'"generic_dmaq"', b'"generic_none"')
    (tmp_path / "other").write_bytes(data)
    shown = tool("show", tmp_path / "other")
    assert shown.returncode == 0
    assert "no register names: there is no plugin 'generic_none'" in shown.stderr
    assert "liveness" not in shown.stdout
    assert "liveness" in tool("show", tmp_path / "other", "--plugin", "generic_dmaq").stdout
    assert tool("show", trace, "--plugin", "generic_none").returncode == 3


def test_replay_against_a_model_is_alike_and_finds_what_is_not(taken, folder):
    trace, _ = taken
    with ModelProcess(folder, "edu", time_scale=1.0) as model:
        alike = tool("replay", trace, model.path)
        assert alike.returncode == 0, alike.stdout + alike.stderr
        assert re.search(r"^\d+ accesses sent, \d+ reads among them, 0 different$", alike.stdout, re.MULTILINE)
        changed = changed_trace(trace, folder / "changed")
        found = tool("replay", "--fast", changed, model.path)
        assert found.returncode == 1
        assert re.search(r"^#\d+ .* r BAR0\+0x4 .* liveness 0xffffedcc$", found.stdout, re.MULTILINE)
        assert "    now: 0xffffedcb  liveness 0xffffedcb" in found.stdout
        ignored = tool("replay", "--fast", changed, model.path, "--ignore", "BAR0+4:4", "--ignore", "CONFIG+0:256")
        assert ignored.returncode == 0, ignored.stdout
        assert "differences ignored" in ignored.stdout
        few = tool("replay", "--fast", changed, model.path, "--limit", "0")
        assert few.returncode == 1
        assert "#" not in few.stdout
        assert re.search(r"and \d+ more", few.stdout)


def changed_trace(trace, path):
    """The same with another value where liveness was read."""
    path.write_bytes(trace.read_bytes().replace(bytes.fromhex("cbedffff"), bytes.fromhex("ccedffff")))
    return path


def test_replay_against_the_server_itself(taken, folder):
    trace, _ = taken
    path = folder / "b.sock"
    with Server(*EDU, "--socket-path", path) as server:
        server.wait_log("listening at")
        done = tool("replay", "--memory", "1", trace, path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_server_answered_is_left_out(taken, folder):
    trace, _ = taken
    with ModelProcess(folder, "edu") as model:
        data = bytearray(trace.read_bytes())
        header_size = int.from_bytes(data[12:16], "little")
        for at in range(header_size, len(data), 40):
            if data[at + 35] < 2:
                data[at + 36] = Answer.DISCARD
        (folder / "dropped").write_bytes(data)
        model.control("accesses")
        before = model.accesses(0)
        done = tool("replay", folder / "dropped", model.path)
        assert done.returncode == 0
        assert "left out, since the server had answered them: " in done.stdout
        assert done.stdout.startswith("0 accesses sent")
        assert model.accesses(0) == before


def test_another_device_is_refused(taken, folder):
    trace, _ = taken
    with ModelProcess(folder, "ioat") as model:
        done = tool("replay", trace, model.path)
    assert done.returncode == 4
    assert "the trace is of 1234:11e8, the device here is 8086:" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("show", "/nonexistent"), 3, "/nonexistent: No such file"),
        (("show", "/etc/passwd"), 3, "/etc/passwd is no trace of --trace-regions"),
        (("show",), 2, "FILE"),
        ((), 2, "try --help"),
        (("replay", "TRACE", "/nonexistent"), 4, "/nonexistent: No such file"),
        (("replay", "TRACE", "/nonexistent", "--ignore", "BAR7+0"), 2, "--ignore BAR7+0: give it as REGION+OFFSET"),
        (("replay", "TRACE", "/nonexistent", "--memory", "-1"), 2, "--memory -1: mebibytes"),
    ],
)
def test_mistakes_are_one_line(taken, arguments, code, words):
    done = tool(*(taken[0] if each == "TRACE" else each for each in arguments))
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_reader_that_has_seen_enough_is_no_error(taken):
    command = f"{sys.executable} -P -m vfu_server.cli_trace show {taken[0]} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=environment(), capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""


def test_places_that_may_differ():
    assert parse_ignored("BAR0+0x24") == Ignored(0, 0x24, 1)
    assert parse_ignored("config+4:2") == Ignored(RegionIndex.CONFIG, 4, 2)
    for wrong in ("", "BAR0", "BAR9+1", "BAR0+-1", "BAR0+1:0", "BAR0+x"):
        with pytest.raises(UsageError, match="--ignore"):
            parse_ignored(wrong)
    covers = Ignored(0, 4, 4).covers
    access = Access(0, 0, 0, False, 0, 0, 4, b"", Answer.PASS, StateClass.RUNNING, 0)
    assert [covers(access)] == [False]
    for offset, width, is_in in ((0, 5, True), (7, 1, True), (8, 1, False), (3, 1, False)):
        moved = Access(0, 0, 0, False, 0, offset, width, b"", Answer.PASS, StateClass.RUNNING, 0)
        assert covers(moved) == is_in


def test_texts_of_a_hostile_file_forge_no_line():
    header = TraceHeader("1\n2", "a\x1b[2J", "p\r", "v\x00", 0, 0, 1 << 70, 0)
    printer = Printer(header, {})
    access = Access(0, 5, 0, False, 8, 1 << 63, 4, b"\x00\x00\x00\x00", Answer.PASS, StateClass.RUNNING, 4000)
    for line in (printer.title(), printer.line(access), printer.line(Mark(Kind.LOST, 3, 12))):
        assert line.isprintable(), line
    assert " 4000" in printer.line(access)
    assert "12 accesses were lost here" in printer.line(Mark(Kind.LOST, 3, 12))


# --- the option


def test_only_a_trace_or_nothing_is_overwritten(folder):
    header = TraceHeader("0", "d", "p", "v", 1, 2, 3, 4)
    for _ in range(2):
        file = TraceFile(str(folder / "trace"))
        with pytest.raises(UsageError, match="another process writes its trace there"):
            TraceFile(str(folder / "trace"))
        file.begin(header).mark_reset()
        file.close()
        file.close()
        assert entries(folder / "trace")[0] == header
        assert len(entries(folder / "trace")[1]) == 1
    (folder / "precious").write_text("words")
    (folder / "link").symlink_to(folder / "trace")
    os.mkfifo(folder / "fifo")
    for target, words in (
        ("precious", "exists and is no trace: remove it"),
        ("link", "symbolic links"),
        ("none/trace", "No such file"),
        (".", "directory"),
        ("fifo", "no regular file"),
    ):
        with pytest.raises(UsageError, match=words):
            TraceFile(str(folder / target))
    assert (folder / "precious").read_text() == "words"


def test_file_that_cannot_be_keeps_the_server_from_starting(folder):
    (folder / "precious").write_text("words")
    done = run(*EDU, "--socket-path", folder / "c.sock", "--trace-regions", folder / "precious")
    assert done.returncode == 2
    assert done.stderr.startswith(f"vfu-server: error: --trace-regions {folder}/precious exists and is no trace")
    assert not (folder / "c.sock").exists()


def test_disk_that_fills_is_told_and_the_device_served_on(folder):
    options = (*EDU, "--socket-path", folder / "c.sock", "--trace-regions", folder / "t", "--log-format", "json")
    with Server(*options) as server:
        server.wait_log("listening at")
        before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        with Client.connect(folder / "c.sock") as client:
            client.negotiate()
            for _ in range(100):
                client.read(0, 0, 4)
            server.wait_log("the trace ends here")
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)
            assert client.read(0, 0, 4) == 0x010000ED
            server.process.send_signal(signal.SIGUSR1)
            server.wait_log('"message": "statistics"')
        assert server.end()[0] == 0
    records = [json.loads(line) for line in server.log.splitlines()]
    ended = next(record for record in records if record["message"].startswith("the trace ends here"))
    assert ended["level"] == "error"
    assert ended["device"] == "edu"
    numbers = next(record["trace"] for record in records if record["message"] == "statistics")
    assert numbers["lost"] > 50
    assert numbers["written"] + numbers["lost"] == 101
    assert os.stat(folder / "t").st_size <= 2000
    assert len([entry for entry in entries(folder / "t")[1] if isinstance(entry, Access)]) == numbers["written"]


def test_each_device_needs_a_file_of_its_own(folder):
    done = run(*EDU, "--model", "edu", "--socket-path", folder / "%n.sock", "--trace-regions", folder / "one")
    assert done.returncode == 2
    assert "two devices have --trace-regions" in done.stderr
    assert Path(folder / "one").exists() is False
