"""A model's process: waited for, listened to, and never left behind."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from tests.server.programs import environment
from vfu_server import server_model
from vfu_server.device import ModelCommand
from vfu_server.errors import HostError

LISTENING = """
import os, signal, socket, sys
path = sys.argv[sys.argv.index("--socket-path") + 1]
sock = socket.socket(socket.AF_UNIX)
"""

MODELS = {
    "well_behaved": LISTENING
    + """
sock.bind(path)
print("about to", "listen", sys.argv[1:-2], file=sys.stderr, flush=True)
os.write(2, b"two\\nlines and a half")
sock.listen()
signal.pause()
""",
    "stubborn": LISTENING
    + """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sock.bind(path)
sock.listen()
while True:
    signal.pause()
""",
    "failing": "import sys\nprint('no such chip', file=sys.stderr)\nsys.exit(7)\n",
    "mute": "import signal\nsignal.pause()\n",
    "never_listens": LISTENING + "sock.bind(path)\nsignal.pause()\n",
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    for name, source in MODELS.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


def running(name, args=()):
    return server_model.running(ModelCommand(name, "for tests", args), "edu")


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process that is not our child ends in time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


@pytest.fixture(autouse=True)
def its_own_folder(tmp_path_factory, monkeypatch) -> Path:
    """Other servers of this machine make folders in the common one."""
    folder = tmp_path_factory.mktemp("m")
    monkeypatch.setattr(server_model.tempfile, "tempdir", str(folder))
    return folder


def folders() -> set[Path]:
    return set(Path(server_model.tempfile.gettempdir()).glob("vfu-model-*"))


def test_listens_talks_and_ends(models, caplog) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        async with running("well_behaved", ("--speed", "3")) as model:
            with trio.fail_after(5):
                stream = await trio.open_unix_socket(model.socket_path)
            await stream.aclose()
            assert (Path(model.socket_path).parent.stat().st_mode & 0o777) == 0o700

    trio.run(main)
    said = [record.getMessage() for record in caplog.records]
    assert "model: about to listen ['--speed', '3']" in said
    assert "model: two" in said
    assert "model: lines and a half" in said
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert folders() == set()


def test_does_not_listen(models, caplog) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        async with running("failing"):
            raise AssertionError("it never listened")

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(main)
    (error,) = caught.value.exceptions
    assert isinstance(error, HostError)
    assert str(error) == "the model ended before it listened (exit status 7); what it said is in the log"
    assert "model: no such chip" in caplog.text


@pytest.mark.parametrize("name", ["mute", "never_listens"])
def test_takes_too_long(models, monkeypatch, name) -> None:
    monkeypatch.setattr(server_model, "START_DEADLINE", 0.3)

    async def main() -> None:
        async with running(name):
            raise AssertionError("it never listened")

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(main)
    assert "did not listen within 0.3 s" in str(caught.value.exceptions[0])


def test_does_not_end_when_asked(models, caplog) -> None:
    async def main() -> float:
        async with running("stubborn"):
            start = time.monotonic()
        return time.monotonic() - start

    assert trio.run(main) < 2 * server_model.STOP_DEADLINE
    assert "does not end by itself and is killed" in caplog.text
    assert "the model has ended: signal 9" in caplog.text


def test_cancelled_while_it_starts(models) -> None:
    async def main() -> None:
        with trio.move_on_after(0.2):
            async with running("mute"):
                raise AssertionError("it never listened")

    trio.run(main)
    assert folders() == set()


def test_dies_with_its_parent(models, tmp_path) -> None:
    """However the parent ends: here by SIGKILL."""
    program = """
import trio
from vfu_server import server_model
from vfu_server.device import ModelCommand

async def main():
    async with server_model.running(ModelCommand("stubborn", ""), "edu") as model:
        print(model._process.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""
    env = environment(tmp_path, TMPDIR=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    assert gone(pid)


def test_its_parent_was_gone_before(models, tmp_path) -> None:
    """The first thing the child does after asking for the death signal is to look whether it came too late."""
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "vfu_server.server_model_child",
            str(os.getppid()),
            "stubborn",
            "--socket-path",
            "x",
        ],
        env=environment(tmp_path),
        cwd=tmp_path,
        timeout=10,
        check=False,
    )
    assert done.returncode == 1


def test_is_spared_a_ctrl_c_at_the_terminal(models) -> None:
    async def main() -> int:
        async with running("well_behaved") as model:
            return os.getpgid(model._process.pid)

    assert trio.run(main) != os.getpgid(0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_folder_of_a_server_that_was_killed_is_removed_by_the_next(models, its_own_folder) -> None:
    left, fresh, held = (its_own_folder / f"vfu-model-{name}" for name in ("left", "fresh", "held"))
    for folder in (left, fresh, held):
        folder.mkdir()
        (folder / "edu.sock").touch()
    for folder in (left, held):
        os.utime(folder, (0, 0))
    link = its_own_folder / "vfu-model-link"
    link.symlink_to(fresh)

    async def main() -> None:
        async with running("well_behaved") as model:
            assert folders() == {Path(model.socket_path).parent, fresh, held, link}

    with server_model._held(held):
        trio.run(main)
    assert (fresh / "edu.sock").exists()
