"""How records look, and that a reader who stops reading stops nobody."""

import json
import logging
import os
import re
import sys

import pytest
import trio

from tests.server.programs import run
from vfu_server import logs


def record(message, *args, level=logging.INFO, exc_info=None, **extra) -> logging.LogRecord:
    made = logging.getLogger("vfu_server.test").makeRecord(
        "vfu_server.test", level, "file.py", 1, message, args, exc_info, extra=extra
    )
    logs._add_device(made)
    return made


def failure() -> tuple:
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        return sys.exc_info()


def test_text() -> None:
    line = logs.TextFormatter().format(record("state %s", "STOP", device="nic0", other=1, phase="save", migration="m1"))
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info    nic0: state STOP \(migration=m1 phase=save other=1\)", line
    )


def test_text_without_device() -> None:
    assert logs.TextFormatter().format(record("hello", level=logging.WARNING)).endswith("Z warning hello")


def test_hostile_text_stays_on_its_line() -> None:
    hostile = "x\n2026-01-01T00:00:00.000Z error   all is lost\x1b[2J\x7f\x9b\u2028"
    line = logs.TextFormatter().format(record("client says %s", hostile, note="a\rb"))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert r"client says x\x0a2026" in line
    assert r"note=a\x0db" in line
    assert len(logs.JsonFormatter().format(record("%s", hostile)).splitlines()) == 1


def test_traceback_follows() -> None:
    lines = logs.TextFormatter().format(record("oh", exc_info=failure())).splitlines()
    assert lines[0].endswith("oh")
    assert lines[1].startswith("Traceback")


def test_journal_gets_priorities_on_each_line() -> None:
    formatter = logs.TextFormatter(journal=True)
    assert formatter.format(record("hello", device="nic0")) == "<6>nic0: hello"
    assert formatter.format(record("hello", level=logging.DEBUG)) == "<7>hello"
    lines = formatter.format(record("oh", level=logging.ERROR, exc_info=failure())).splitlines()
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)


def test_json() -> None:
    made = record("state %s", "STOP", device="nic0", phase="save", migration="m1", level=logging.WARNING, size=7)
    entry = json.loads(logs.JsonFormatter().format(made))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry == {
        "level": "warning",
        "logger": "vfu_server.test",
        "device": "nic0",
        "message": "state STOP",
        "migration": "m1",
        "phase": "save",
        "size": 7,
    }


def test_json_extra_cannot_hide_a_field() -> None:
    entry = json.loads(
        logs.JsonFormatter().format(record("hi", level=logging.INFO, time="late", odd={1, 2}, logger="x"))
    )
    assert entry["message"] == "hi"
    assert entry["logger"] == "vfu_server.test"
    assert entry["logger_"] == "x"
    assert entry["time_"] == "late"
    assert "error" in json.loads(logs.JsonFormatter().format(record("oh", exc_info=failure())))


def test_device_of_the_task_that_logs() -> None:
    seen = []

    async def task(name) -> None:
        logs.DEVICE.set(name)
        await trio.lowlevel.checkpoint()
        seen.append((name, record("x").device, record("x", device="given").device))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for name in ("nic0", "nic1"):
                nursery.start_soon(task, name)

    trio.run(main)
    assert sorted(seen) == [("nic0", "nic0", "given"), ("nic1", "nic1", "given")]
    assert record("x").device == ""


def test_reader_that_stops_reading(monkeypatch) -> None:
    monkeypatch.setattr(logs, "_WRITE_DEADLINE_MS", 1)
    reader, writer = os.pipe()
    handler = logs.StderrHandler(writer)
    handler.setFormatter(logs.TextFormatter())
    for _ in range(100):
        handler.emit(record("x" * 2000))
    kept = os.read(reader, 1 << 20).count(b"\n")
    assert 0 < kept < 100
    handler.emit(record("back again"))
    lines = os.read(reader, 1 << 20).decode().splitlines()
    assert lines[-2].endswith(f"warning {100 - kept} log records were lost: nobody read them")
    assert lines[-1].endswith("back again")
    os.close(reader)
    handler.emit(record("into the void"))
    os.close(writer)


def test_record_that_cannot_be_formatted(capfd) -> None:
    reader, writer = os.pipe()
    handler = logs.StderrHandler(writer)
    handler.setFormatter(logs.TextFormatter())
    handler.emit(record("%d", "no number"))
    handler.emit(record("fine"))
    assert os.read(reader, 1000).endswith(b"fine\n")
    assert "TypeError" in capfd.readouterr().err
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("form", ["text", "json"])
def test_errors_of_the_program_have_the_format(form) -> None:
    done = run("--plugin", "nope", "--model", "x", "--log-format", form)
    assert done.returncode == 3
    if form == "json":
        entry = json.loads(done.stderr)
        assert (entry["level"], entry["message"][:26]) == ("error", "there is no plugin 'nope';")
    else:
        assert done.stderr.startswith("vfu-server: error: there is no plugin 'nope'; installed: ")
