"""`vfu-migrate --qmp` against something that speaks QMP: what it says of a QEMU that can, that refuses, that cannot."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfu_server.tools.migrate import run

GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 1}}, "capabilities": []}}
DEVICES = {
    "/machine/peripheral": [{"name": "dev0", "type": "child<vfio-user-pci>"}, {"name": "type", "type": "string"}]
}


@contextmanager
def speaking(path: Path, answers: dict[str, object], greeting: bytes | None = None) -> Iterator[str]:
    """A socket that answers each command with what `answers` has, else with nothing special."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener.accept()[0] as client, client.makefile("rwb", buffering=0) as stream:
            stream.write(greeting if greeting is not None else json.dumps(GREETING).encode() + b"\n")
            while line := stream.readline():
                asked = json.loads(line)
                answer = answers.get(asked["execute"], {})
                if callable(answer):
                    answer = answer(asked["arguments"])
                reply = answer if isinstance(answer, dict) and "error" in answer else {"return": answer}
                stream.write(b'{"event": "SOMETHING"}\n' + json.dumps(reply).encode() + b"\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield str(path)
    finally:
        thread.join(60)
        listener.close()


def answers(*properties: str, reasons: tuple[str, ...] = ()) -> dict[str, object]:
    return {
        "qom-list": lambda arguments: DEVICES.get(arguments["path"], []),
        "device-list-properties": [{"name": name} for name in properties],
        "query-migrate": {"blocked-reasons": list(reasons)} if reasons else {},
    }


def test_a_qemu_that_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with speaking(tmp_path / "qmp", answers("socket", "enable-migration")) as path:
        assert run(["--qmp", path]) == 0
    said = capsys.readouterr().out
    assert "/machine/peripheral/dev0" in said
    assert "carries the state" in said


def test_a_qemu_that_cannot_and_would_not_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with speaking(tmp_path / "qmp", answers("socket")) as path:
        assert run(["--qmp", path]) == 1
    said = capsys.readouterr().out
    assert "does not refuse" in said
    assert "device_del" in said
    assert "missing to move the state" in said


def test_a_qemu_that_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with speaking(tmp_path / "qmp", answers("enable-migration", reasons=("no dirty tracking",))) as path:
        assert run(["--qmp", path]) == 1
    assert "no dirty tracking" in capsys.readouterr().out


def test_a_machine_without_our_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with speaking(tmp_path / "qmp", {"qom-list": []}) as path:
        assert run(["--qmp", path]) == 0
    assert "nothing of ours" in capsys.readouterr().out


@pytest.mark.parametrize("greeting", [b"220 mail ready\n", b"[]\n", b'{"QMP": 3}\n', b""])
def test_what_is_no_qmp_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str], greeting: bytes) -> None:
    with speaking(tmp_path / "qmp", {}, greeting or b"\n") as path:
        assert run(["--qmp", path]) == 1
    assert "QmpError: this is no QMP socket" in capsys.readouterr().err


def test_a_refused_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with speaking(tmp_path / "qmp", {"qom-list": {"error": {"desc": "not today"}}}) as path:
        assert run(["--qmp", path]) == 1
    assert "qom-list: not today" in capsys.readouterr().err


def test_no_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--qmp", str(tmp_path / "none")]) == 3
    assert "cannot be connected to" in capsys.readouterr().err


def test_with_other_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["--qmp", "a", "b", "c"])
    assert ended.value.code == 2
