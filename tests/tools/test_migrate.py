"""`vfu-migrate`: a device from server to server, into a file and out of it; what fails, and who runs afterwards."""

import contextlib
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.plugins_synthetic.device import FAULTS, REG_FAULT
from tests.plugins_synthetic.serving import serving
from tests.server.programs import environment
from tests.tools.conftest import tool
from vfu_server.testing import Client
from vfu_server.tools import migrate, outcome
from vfu_server.uapi import MigState


@contextlib.contextmanager
def client_of(server):
    with Client.connect(server.path) as client:
        client.negotiate()
        yield client


def run(*arguments):
    return migrate.run([str(argument) for argument in arguments])


def started(*arguments, **how):
    """The tool as a process that goes on."""
    command = [sys.executable, "-P", "-m", "vfu_server.tools.migrate", *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def wait_line(process, text, seconds=15.0):
    deadline = time.monotonic() + seconds
    lines = b""
    while text.encode() not in lines:
        readable = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))[0]
        chunk = os.read(process.stdout.fileno(), 4096) if readable else b""
        assert chunk, (lines, process.poll())
        lines += chunk
    return lines.decode()


def test_a_device_is_moved(servers, capsys):
    source, destination = servers
    assert run(source.path, destination.path) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[-1] == "the destination runs"
    assert any("ms  pre-copy data" in line for line in lines)
    (state,) = [line for line in lines if line.startswith("state: ")]
    assert int(state.split()[1]) > 8 << 20
    assert "bytes early in 1 rounds, " in state
    (downtime,) = [line for line in lines if line.startswith("downtime: ")]
    assert "ms, most of it " in downtime


def test_without_pre_copy_all_is_moved_after_the_stop(servers, capsys):
    source, destination = servers
    assert run("--no-pre-copy", source.path, destination.path) == 0
    out = capsys.readouterr().out
    assert "early" not in out
    assert int(out.split("state: ")[1].split()[0]) > 8 << 20


def test_quiet(servers, capsys):
    source, destination = servers
    assert run("--quiet", source.path, destination.path) == 0
    assert capsys.readouterr() == ("", "")


def test_a_file_there_and_back(servers, tmp_path, capsys):
    source, destination = servers
    file = tmp_path / "state.bin"
    assert run("save", source.path, file) == 0
    assert f"bytes in {file}\nthe source runs\n" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["state.bin"]
    code, out, _ = tool("stream", "verify", file)
    assert (code, "(synthetic)" in out) == (0, True)
    assert run("load", file, destination.path) == 0
    assert capsys.readouterr().out.endswith("the destination runs\n")


def test_a_state_that_is_spoilt_is_refused(servers, tmp_path, capsys):
    source, destination = servers
    file = tmp_path / "state.bin"
    assert run("save", source.path, file) == 0
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run("load", file, destination.path) == 1
    err = capsys.readouterr().err
    assert err.startswith("vfu-migrate: error: ReplyError: ")
    assert "failed in step '" in err
    assert "the destination was reset: it runs, without the state" in err
    with client_of(destination) as client:
        assert client.mig_state() is MigState.RUNNING


def order(server, fault):
    """Have a fault strike in the next client's migration: the fault outlives the reset between."""
    with client_of(server) as client:
        client.write(0, REG_FAULT, 4, FAULTS.index(fault))


@pytest.mark.parametrize(
    ("where", "fault", "step"),
    [
        (0, "stop", "source STOP_COPY"),
        (0, "save", "stop-copy data"),
        (0, "save early", "pre-copy data"),
        (1, "load", "pre-copy data"),
        (1, "load_done", "destination RUNNING"),
        (1, "start", "destination RUNNING"),
    ],
)
def test_a_failure_is_told_and_the_source_runs(servers, capsys, where, fault, step):
    order(servers[where], fault)
    assert run(servers[0].path, servers[1].path) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vfu-migrate: error: ReplyError: ")
    assert f"  migration failed in step '{step}'\n" in err
    assert "  the source runs again\n" in err
    assert run("--quiet", servers[0].path, servers[1].path) == 0


def test_a_save_that_fails_leaves_no_file(servers, tmp_path, capsys):
    order(servers[0], "save")
    assert run("save", servers[0].path, tmp_path / "state.bin") == 1
    err = capsys.readouterr().err
    assert "failed in step 'data'" in err
    assert "the source runs" in err
    assert os.listdir(tmp_path) == []


def test_an_older_file_stays_when_a_save_fails(servers, tmp_path):
    file = tmp_path / "state.bin"
    file.write_bytes(b"older")
    order(servers[0], "save")
    assert run("save", servers[0].path, file) == 1
    assert file.read_bytes() == b"older"
    assert run("--quiet", "save", servers[0].path, file) == 0
    assert file.stat().st_size > 8 << 20


def test_places_that_cannot_be_had(servers, tmp_path, capsys):
    source, _ = servers
    cases = {
        ("save", source.path, tmp_path / "no" / "file"): "cannot be written: No such file or directory",
        ("load", tmp_path / "none", source.path): "cannot be read: No such file or directory",
        (source.path, tmp_path / "none.sock"): "cannot be connected to: No such file or directory",
        ("save", tmp_path / "none.sock", tmp_path / "file"): "cannot be connected to",
        ("save", source.path, "/dev/full/state"): "cannot be written: Not a directory",
    }
    for arguments, words in cases.items():
        assert run(*arguments) == outcome.Outcome.FILE
        err = capsys.readouterr().err
        assert err.startswith("vfu-migrate: error: PlaceError: ")
        assert words in err


def test_a_disk_that_is_full(servers, tmp_path, capsys):
    """Nobody is left stopped for it."""
    source, _ = servers
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        assert run("save", source.path, tmp_path / "state.bin") == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    err = capsys.readouterr().err
    assert "cannot be written: File too large" in err
    assert "the source runs" in err
    assert os.listdir(tmp_path) == []


def test_a_server_that_has_a_client(servers, capsys):
    source, destination = servers
    with client_of(source):
        assert run(source.path, destination.path) == 1
    assert "another client may be there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["one"],
        ["one", "two", "three"],
        ["save", "a", "b", "c"],
        ["--hold", "save", "a", "b"],
        ["--no-pre-copy", "load", "a", "b"],
        ["--fast", "a", "b"],
    ],
)
def test_what_cannot_be_meant(arguments):
    code, out, err = tool("migrate", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("vfu-migrate: error: ")
    assert "Traceback" not in err


def test_help_names_the_exit_codes():
    code, out, _ = tool("migrate", "--help")
    assert code == 0
    for number in outcome.Outcome:
        assert f"\n    {number.value}  " in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_moved_is_held_until_a_signal(servers, number):
    source, destination = servers
    with started("--hold", source.path, destination.path) as process:
        wait_line(process, "the destination runs\n")
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(5) == 0
        assert process.stderr.read() == b""


def test_a_held_device_that_is_lost_is_told(site, servers):
    source, _ = servers
    told = b""
    with contextlib.suppress(AssertionError), serving(site, "c", size=8 << 20) as lost:
        with started("--hold", source.path, lost.path) as process:
            wait_line(process, "the destination runs\n")
            lost.process.kill()
            told = process.stderr.read() if process.wait(5) == 1 else b""
        raise AssertionError  # a server that was killed has no good end
    assert b"ConnectionClosedError: the server closed the connection" in told
    assert b"the device is lost" in told


def test_a_signal_in_the_middle_leaves_the_source_running(site):
    shape = {"size": 64 << 20, "pre_copy": True, "slow_load": 0.05}
    with serving(site, "e", **shape) as source, serving(site, "f", **shape) as destination:
        with started(source.path, destination.path) as process:
            source.wait_log("RUNNING -> PRE_COPY")
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 1
            err = process.stderr.read().decode()
        assert "InterruptError: interrupted by a signal" in err
        assert "  migration failed in step 'pre-copy data'\n" in err
        assert "  the source runs again\n" in err
        source.wait_log("PRE_COPY -> RUNNING")
        assert "STOP_COPY" not in source.log


def test_progress_is_shown_on_a_terminal(servers):
    source, destination = servers
    ours, theirs = pty.openpty()
    command = [sys.executable, "-P", "-m", "vfu_server.tools.migrate", str(source.path), str(destination.path)]
    env = environment(TERM="xterm", COLUMNS="100")
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                shown += chunk
        assert process.wait(20) == 0
        assert b"the destination runs" in process.stdout.read()
    os.close(ours)
    assert b"source STOP" in shown
    assert b"8.0/8.0 MiB" in shown


def test_a_device_that_changes_all_the_time_is_moved_in_rounds(site, capsys):
    """It does so by an option, since a client's own wishes would not outlive its leaving."""
    shape = {"size": 32 << 20, "pre_copy": True, "churn": 4}
    with serving(site, "g", **shape) as source, serving(site, "h", **shape) as destination:
        assert run(source.path, destination.path) == 0
    out = capsys.readouterr().out
    early, late = (int(word) for word in out.split("state: ")[1].split() if word.isdigit() and len(word) > 2)
    assert early > 32 << 20
    assert late < 8 << 20
