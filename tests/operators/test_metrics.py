"""Numbers for operators: as log records at a signal and at the end, and as Prometheus metrics at a local listener."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.documents import table
from tests.server.programs import Server, run
from vfu_server import metrics_listener, metrics_prometheus
from vfu_server.config import MetricsAddress, metrics_address
from vfu_server.errors import UsageError
from vfu_server.host_device import HostStatistics
from vfu_server.libvfio_user.context import ContextStatistics
from vfu_server.libvfio_user.trace import TraceNumbers
from vfu_server.metrics import DeviceReport, fields
from vfu_server.metrics_prometheus import INFO, PREFIX, SERIES, renderer
from vfu_server.migration import Arc
from vfu_server.policy import Answer, StateClass
from vfu_server.session_counts import ArcTimes, SessionStatistics
from vfu_server.sockets import Listener
from vfu_server.testing import Client
from vfu_server.uapi import MigState

EDU = ("--plugin", "generic_dmaq", "--model", "edu")
DOCUMENT = "docs/operators/metrics.md"

EVERYTHING = SessionStatistics(
    context=ContextStatistics(
        messages=10,
        replies=9,
        errors=2,
        notices=3,
        notices_lost=1,
        fds_closed=0,
        connections=2,
        accesses={(Answer.PASS, StateClass.RUNNING, "read"): 5, (Answer.DISCARD, StateClass.STOPPED, "write"): 1},
    ),
    mistakes={"a kind of mistake": 3, 'another "one"\n': 1},
    clients=2,
    state=MigState.STOP,
    arcs={Arc(MigState.RUNNING, MigState.STOP): ArcTimes(2, 1, 0.25, 0.2)},
    bytes_saved=100,
    bytes_loaded=200,
    resets=3,
    overruns=2,
    relays=4,
    host=HostStatistics(1, 4096, 50, 6, 1),
    plugin={"drains": 7},
    trace=TraceNumbers(8, 9, 320, 0),
)
REPORTS = [
    DeviceReport("edu", "--model edu", "serving", "generic_dmaq", "0.1", EVERYTHING),
    DeviceReport("other", "--bdf 0000:00:04.0", "opening"),
]


# --- the documentation


def test_every_metric_is_documented_with_its_kind_and_labels():
    documented = {
        row[0].strip("`"): (row[1], tuple(re.findall(r"`(\w+)`", row[2]))) for row in table(DOCUMENT, "metric")
    }
    real = {PREFIX + name: ("gauge", labels) for name, labels, _ in INFO}
    real |= {
        PREFIX + series.name: ("counter" if series.is_counter else "gauge", ("device", *series.labels))
        for series in SERIES
    }
    assert documented == real


def test_every_field_of_the_log_record_is_documented():
    documented = [name for row in table(DOCUMENT, "field") for name in re.findall(r"`(\w+)`", row[0])]
    assert documented == list(fields(REPORTS[0]))


# --- what is told


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_scrape_has_everything():
    kind, body = renderer(lambda: REPORTS)()
    assert kind.startswith("text/plain")
    found = samples(body.decode())
    edu = ("device", "edu")
    for name, labels, value in (
        ("device_stage", [edu, ("stage", "serving")], 1),
        ("device_stage", [edu, ("stage", "lost")], 0),
        ("device_stage", [("device", "other"), ("stage", "opening")], 1),
        ("migration_state", [edu, ("state", "STOP")], 1),
        ("migration_state", [edu, ("state", "RUNNING")], 0),
        ("accesses_total", [("answer", "pass"), ("class", "running"), edu, ("direction", "read")], 5),
        ("accesses_total", [("answer", "discard"), ("class", "stopped"), edu, ("direction", "write")], 1),
        ("client_mistakes_total", [edu], 5),
        ("dma_bytes", [edu], 4096),
        ("migration_arcs_total", [edu, ("result", "failed"), ("source", "RUNNING"), ("target", "STOP")], 1),
        ("migration_arc_seconds_total", [edu, ("source", "RUNNING"), ("target", "STOP")], 0.25),
        ("migration_bytes_total", [edu, ("direction", "loaded")], 200),
        ("trace_accesses_total", [edu, ("result", "lost")], 9),
        ("plugin_statistic", [edu, ("name", "drains")], 7),
    ):
        assert found[(PREFIX + name, *labels)] == value, name
    names = {key[0] for key in found}
    assert names == {PREFIX + series.name for series in SERIES} | {PREFIX + name for name, *_ in INFO}
    assert not [
        key
        for key in found
        if ("device", "other") in key and key[0] not in (PREFIX + "device_stage", PREFIX + "device_info")
    ]


def test_record_in_words_and_as_an_object():
    told = fields(REPORTS[0])
    assert str(told["accesses"]) == "[running [pass [read 5]], stopped [discard [write 1]]]"
    assert str(told["arcs"]) == "[RUNNING -> STOP [done 2, failed 1, ms 250.0, longest_ms 200.0]]"
    again = json.loads(json.dumps(told))
    assert again["accesses"] == {"running": {"pass": {"read": 5}}, "stopped": {"discard": {"write": 1}}}
    assert again["mistakes"] == EVERYTHING.mistakes
    assert again["trace"] == {"written": 8, "lost": 9, "bytes": 320, "error": 0}
    assert fields(REPORTS[1]) == {"stage": "opening"}


# --- the listener


def ask(address, request, *, hold=False):
    """What is answered to raw bytes."""
    with contextlib.closing(connect(address)) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(request)
            if not hold:
                sock.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    return answer


def connect(address):
    sock = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET)
    sock.settimeout(10)
    sock.connect(address.path or (address.host, address.port))
    return sock


@contextlib.asynccontextmanager
async def listening(render=lambda: ("text/x", b"numbers\n"), deadline=5.0):
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(64)
    listener = Listener(sock, "test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(metrics_listener.serve, listener, render, deadline)
        yield MetricsAddress(host="127.0.0.1", port=sock.getsockname()[1])
        nursery.cancel_scope.cancel()
    listener.close()


def in_trio(function):
    async def limited():
        with trio.fail_after(30):
            await function()

    trio.run(limited)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/x\r\nContent-Length: 8\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", OK + b"numbers\n"),
        (b"GET /metrics?name=x HTTP/1.0\n\n", OK + b"numbers\n"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", OK),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n"),
        (b"GET /other HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found\r\n"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"HTTP/1.1 405 Method Not Allowed\r\n"),
        (b"GET /metrics\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40), b"HTTP/1.1 400 Bad Request\r\n"),
        (b"", b"HTTP/1.1 400 Bad Request\r\n"),
        (b"GET /" + b"a" * 20000, b"HTTP/1.1 431 Request Header Fields Too Large\r\n"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 20000 + b"\r\n\r\n", b"HTTP/1.1 431 Request"),
    ],
)
def test_answers(request_, answer):
    @in_trio
    async def go():
        async with listening() as address:
            found = await trio.to_thread.run_sync(ask, address, request_)
        assert found.startswith(answer)
        assert b"\r\n\r\n" in found


def test_scrape_that_fails_is_told_and_the_next_one_answered(caplog):
    calls = []

    def render():
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("a bug")
        return "text/x", b"numbers\n"

    @in_trio
    async def go():
        async with listening(render) as address:
            first = await trio.to_thread.run_sync(ask, address, b"GET /metrics HTTP/1.1\r\n\r\n")
            second = await trio.to_thread.run_sync(ask, address, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 500 ")
        assert b"a bug" not in first
        assert second == OK + b"numbers\n"

    assert caplog.text.count("a scrape failed") == 1


def test_clients_that_say_nothing_hold_nobody_up():
    @in_trio
    async def go():
        async with listening(deadline=0.2) as address:
            silent = [await trio.to_thread.run_sync(connect, address) for _ in range(3 * metrics_listener.AT_ONCE)]
            gone = await trio.to_thread.run_sync(connect, address)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            gone.close()
            found = await trio.to_thread.run_sync(ask, address, b"GET /metrics HTTP/1.1\r\n\r\n")
            for sock in silent:
                sock.close()
        assert found == OK + b"numbers\n"


# --- the address


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("unix:/run/m.sock", MetricsAddress(path="/run/m.sock"), "unix:/run/m.sock"),
        ("127.0.0.1:9100", MetricsAddress(host="127.0.0.1", port=9100), "127.0.0.1:9100"),
        ("localhost:0", MetricsAddress(host="127.0.0.1"), "127.0.0.1:0"),
        ("[::1]:9100", MetricsAddress(host="::1", port=9100), "[::1]:9100"),
        ("127.8.8.8:1", MetricsAddress(host="127.8.8.8", port=1), "127.8.8.8:1"),
    ],
)
def test_addresses(text, address, shown):
    assert metrics_address(text) == address
    assert str(address) == shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unix:", "names no path"),
        ("0.0.0.0:9100", "only addresses of this machine's loopback"),
        ("[::]:9100", "only addresses"),
        ("10.0.0.1:9100", "only addresses"),
        ("example.org:9100", "'example.org' is no address"),
        (":9100", "'' is no address"),
        ("127.0.0.1", "give it as unix:PATH or HOST:PORT"),
        ("127.0.0.1:", "give it as"),
        ("127.0.0.1:65536", "give it as"),
        ("127.0.0.1:-1", "give it as"),
        ("127.0.0.1:http", "give it as"),
    ],
)
def test_addresses_that_cannot_be(text, words):
    with pytest.raises(UsageError) as told:
        metrics_address(text)
    assert words in str(told.value)
    assert str(told.value).startswith(f"--metrics {text}")


# --- the program


def test_program_tells_the_same_in_three_ways(folder):
    options = ("--log-format", "json", "--metrics", f"unix:{folder}/metrics", "--socket-path", folder / "a.sock")
    with Server(*EDU, *options) as server:
        server.wait_log("listening at")
        assert os.stat(folder / "metrics").st_mode & 0o777 == 0o600
        with Client.connect(folder / "a.sock") as client:
            client.negotiate()
            for _ in range(5):
                client.read(0, 0, 4)
            scraped = ask(MetricsAddress(path=f"{folder}/metrics"), b"GET /metrics HTTP/1.1\r\n\r\n", hold=True)
            server.process.send_signal(signal.SIGUSR1)
            server.wait_log('"message": "statistics"')
        assert server.end()[0] == 0
    assert not (folder / "metrics").exists()
    head, _, body = scraped.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    labels = (("answer", "pass"), ("class", "running"), ("device", "edu"), ("direction", "read"))
    assert samples(body.decode())[(PREFIX + "accesses_total", *labels)] == 5
    records = [json.loads(line) for line in server.log.splitlines()]
    told = {record["message"]: record for record in records if record["message"].startswith("statistics")}
    assert told["statistics"]["accesses"] == {"running": {"pass": {"read": 5}}}
    assert told["statistics"]["device"] == "edu"
    assert told["statistics"]["level"] == "info"
    end = told["statistics at the end"]
    assert (end["clients"], end["resets"], end["accesses"]) == (1, 1, {"running": {"pass": {"read": 5}}})


def test_signal_before_anything_is_open_does_no_harm(folder):
    with Server(*EDU, "--socket-path", folder / "a.sock") as server:
        deadline = 0
        while b"USR1" not in sigignored(server.process.pid) and server.process.poll() is None:
            deadline += 1
            assert deadline < 10_000_000
        server.process.send_signal(signal.SIGUSR1)
        server.wait_log("listening at")
        server.process.send_signal(signal.SIGUSR1)
        server.wait_log("edu: statistics (stage=serving state=RUNNING")
        assert server.end()[0] == 0


def sigignored(pid):
    """b"USR1" if the process ignores or handles that signal by now."""
    with open(f"/proc/{pid}/status", "rb") as status:
        masks = dict(line.split(b":\t") for line in status.read().splitlines() if line.startswith(b"Sig"))
    taken = int(masks[b"SigIgn"], 16) | int(masks[b"SigCgt"], 16)
    return b"USR1" if taken >> (signal.SIGUSR1 - 1) & 1 else b""


def test_missing_package_is_named_with_its_extra(folder):
    (folder / "site").mkdir()
    (folder / "site" / "prometheus_client.py").write_text("raise ImportError('not here')\n")
    options = ("--metrics", "localhost:0", "--socket-path", folder / "a.sock")
    done = run(*EDU, *options, sites=[folder / "site"])
    assert done.returncode == 2
    assert "--metrics needs the Python package prometheus_client" in done.stderr
    assert "vfu-server[metrics]" in done.stderr
    assert not (folder / "a.sock").exists()


def test_address_that_is_taken(folder):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        done = run(*EDU, "--metrics", f"127.0.0.1:{port}", "--socket-path", folder / "a.sock")
    assert done.returncode == 5
    assert f"--metrics 127.0.0.1:{port}: Address already in use" in done.stderr
    (folder / "file").write_text("")
    done = run(*EDU, "--metrics", f"unix:{folder}/file", "--socket-path", folder / "a.sock")
    assert done.returncode == 5
    assert f"for --metrics unix:{folder}/file" in done.stderr
    assert not (folder / "a.sock").exists()


def test_serving_without_it_needs_no_prometheus():
    code = "import vfu_server.server, vfu_server.server_device, sys; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert metrics_prometheus.renderer is renderer
