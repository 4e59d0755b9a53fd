"""The whole program with a software model as its device: serving, ending, losing devices, refusing."""

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.in_time import in_time
from tests.server.programs import PROBE, TREE, Server, command, environment, install, run
from vfu_server.testing import Client, ReplyError
from vfu_server.uapi import PCI_COMMAND, RegionIndex

EDU = ("--plugin", "generic_dmaq", "--model", "edu")

# A plugin that changes one thing about generic_dmaq's device, for the time of a test.
CHANGED = """
import threading, trio
from plugins.generic_dmaq.probe import probe
from vfu_server.device import Capabilities
from vfu_server.errors import HostError
from vfu_server.hookspecs import hookimpl

VFU_SERVER_API = 1

async def for_ever(self):
    print("the device does not come to rest", flush=True)
    await trio.sleep_forever()

async def stuck(self):
    print("the device is stuck", flush=True)
    threading.Event().wait()

async def in_a_thread(self):
    await trio.to_thread.run_sync(threading.Event().wait)

async def shielded(self):
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()

async def refuses(self):
    raise HostError("no reset")

async def fails(self):
    raise ValueError("a bug")

@hookimpl
def vfu_server_probe(host, options):
    device = probe(host, {})
    device.__class__ = type("Changed", (device.__class__,), %s)
    return device
"""


def changed(folder, members: str) -> Path:
    return install(folder / "site", "changed_plugin", {"changed": CHANGED % members})


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int, seconds: float = 30.0) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(fd):
        return bool(select.select([fd], [], [], seconds)[0])


def edu_id(client: Client) -> int:
    return client.read(RegionIndex.BAR0, 0, 4)


def client_of(path) -> Client:
    client = Client.connect(str(path), timeout=30.0)
    try:
        client.negotiate()
    except BaseException:
        client.close()
        raise
    return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serves_clients_and_ends_within_a_second(folder, number) -> None:
    path = folder / "edu.sock"

    def serve() -> float:
        with Server(*EDU, "--socket-path", path, TMPDIR=str(folder)) as server:
            server.wait_log("listening at")
            (model,) = children(server.process.pid)
            for _ in range(3):
                with client_of(path) as client:
                    assert edu_id(client) == 0x010000ED
            with client_of(path) as client:
                client.write(RegionIndex.CONFIG, PCI_COMMAND, 2, 6)
                code, seconds = server.end(number)
            assert code == 0, server.log
            assert is_gone(model)
        assert f"{number.name}: bringing devices to rest" in server.log
        assert "Traceback" not in server.log
        return seconds

    in_time(1.0, serve)
    assert os.listdir(folder) == []


def test_tells_the_service_manager(folder) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        manager.settimeout(20)
        options = ("--plugin", "generic_dmaq", "--model", "edu", "--model", "ioat", "--socket-path", folder / "%n.sock")
        with Server(*options, NOTIFY_SOCKET=str(folder / "notify"), WATCHDOG_USEC="200000") as server:
            heard = []
            while not heard or b"READY=1" not in heard[-1]:
                heard.append(manager.recv(1000))
            assert heard[-1] == b"READY=1\nSTATUS=serving: edu, ioat"
            for name in ("edu", "ioat"):
                client_of(folder / f"{name}.sock").close()
            for child in children(server.process.pid):
                variables = Path(f"/proc/{child}/environ").read_text().split("\0")
                assert not [name for name in variables if name.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))]
            while manager.recv(1000) != b"WATCHDOG=1":
                pass
            code, _ = server.end()
            while (last := manager.recv(1000)) == b"WATCHDOG=1":
                pass
            assert last == b"STOPPING=1\nSTATUS=bringing devices to rest"
            assert code == 0


def test_lost_device_ends_alone_and_the_last_one_ends_the_process(folder) -> None:
    (folder / "server.toml").write_text(
        f'[server]\nlog-format = "json"\n[defaults]\nplugin = "generic_dmaq"\nsocket-path = "{folder}/%n.sock"\n'
        '[[device]]\nname = "one"\nmodel = "edu"\n[[device]]\nname = "two"\nmodel = "edu"\n'
    )
    with Server("--config", folder / "server.toml") as server:
        for name in ("one", "two"):
            server.wait_log(f"listening at {folder}/{name}.sock")
        sockets = {}
        for child in children(server.process.pid):
            arguments = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            sockets["one" if any(arg.endswith("one.sock") for arg in arguments) else "two"] = child
        with client_of(folder / "two.sock") as client:
            os.kill(sockets["one"], signal.SIGKILL)
            server.wait_log("the device is no longer served")
            assert edu_id(client) == 0x010000ED
            assert not (folder / "one.sock").exists()
        os.kill(sockets["two"], signal.SIGKILL)
        assert server.wait() == 6, server.log
    entries = [json.loads(line) for line in server.log.splitlines()]
    lost = [entry["device"] for entry in entries if entry["message"].startswith("the device is no longer served")]
    assert lost == ["one", "two"]
    assert not (folder / "two.sock").exists()


def test_second_server_is_refused_and_the_first_serves_on(folder) -> None:
    path = folder / "edu.sock"
    with Server(*EDU, "--socket-path", path) as server:
        server.wait_log("listening at")
        done = run(*EDU, "--socket-path", path)
        assert done.returncode == 5
        assert done.stderr.startswith(f"vfu-server: error: a live server listens at {path}: stop it, or choose")
        with client_of(path) as client:
            assert edu_id(client) == 0x010000ED


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((*EDU, "--option", "nonsense=1"), 2, "nonsense"),
        (("--plugin", "refusing", "--model", "toy"), 4, "plugin 'refusing' does not take toy (1234:11e8 revision 10)"),
        (("--plugin", "failing", "--model", "toy"), 4, "the model ended before it listened (exit status 7)"),
        (("--plugin", "auto", "--model", "toy"), 3, "plugins 'changed' and 'generic_dmaq' both take toy (1234:11e8"),
        (("--plugin", "changed", "--model", "toy", "--require-migration"), 4, "cannot be migrated: no such luck"),
        (("--plugin", "odd", "--model", "toy"), 3, "plugin 'odd': vfu_server_probe returned int instead of a Device"),
        (
            ("--plugin", "crashing", "--model", "toy"),
            70,
            "plugin 'crashing' failed in vfu_server_probe: ZeroDivisionError",
        ),
        (
            ("--plugin", "refusing", "--model", "toy", "--model", "none"),
            2,
            "--model none: plugin 'refusing' has no such",
        ),
    ],
)
def test_start_that_fails(folder, arguments, code, words) -> None:
    toy = """
from vfu_server.device import ModelCommand

@hookimpl
def vfu_server_models():
    return {"toy": ModelCommand("plugins.generic_dmaq.models", "edu", ("edu",))}
"""
    site = changed(folder, '{"capabilities": Capabilities(False, "no such luck")}')
    (site / "changed.py").write_text((site / "changed.py").read_text() + toy)
    modules = {
        "refusing": PROBE + toy,
        "failing": PROBE + toy.replace("plugins.generic_dmaq.models", "ends_at_once"),
        "odd": PROBE.replace("return None", "return 5") + toy,
        "crashing": PROBE.replace("return None", "return 1 / 0") + toy,
    }
    if "auto" in arguments:  # only one may have the model, while all are asked for the device
        modules = {name: source.partition("\nfrom vfu_server.device")[0] for name, source in modules.items()}
    points = {name: name for name in modules}
    install(site, "several_plugins", {**modules, "ends_at_once": "raise SystemExit(7)"}, plugins=points)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folder / "notify"))
        manager.setblocking(False)
        done = run(
            *arguments,
            *("--socket-path", folder / "%n.sock"),
            sites=[site],
            TMPDIR=str(folder),
            NOTIFY_SOCKET=str(folder / "notify"),
        )
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert ("Traceback" in done.stderr) == (code == 70)
        with contextlib.suppress(BlockingIOError):
            while heard := manager.recv(1000):
                assert b"READY" not in heard
    assert sorted(os.listdir(folder)) == ["notify", "site"]


def test_signal_while_it_starts(folder) -> None:
    toy = "\nfrom vfu_server.device import ModelCommand\n\n@hookimpl\ndef vfu_server_models():\n"
    source = PROBE + toy + "    return {'mute': ModelCommand('mute_model', 'says nothing')}\n"
    mute = "import signal\nprint('mute', flush=True)\nsignal.pause()\n"
    site = install(folder / "site", "mute_plugin", {"mute": source, "mute_model": mute}, plugins={"mute": "mute"})
    options = ("--plugin", "mute", "--model", "mute", "--socket-path", folder / "a.sock")

    def start() -> float:
        with Server(*options, sites=[site], TMPDIR=str(folder)) as server:
            server.wait_log("model: mute")
            code, seconds = server.end()
        assert code == 0, server.log
        return seconds

    in_time(1.0, start)
    assert os.listdir(folder) == ["site"]


def test_second_signal_ends_at_once(folder) -> None:
    site = changed(folder, '{"aclose": for_ever}')
    options = ("--plugin", "changed", "--device-socket", folder / "model.sock", "--socket-path", folder / "edu.sock")
    with edu_model(folder), Server(*options, sites=[site], popen={"stdout": subprocess.PIPE}) as server:
        server.wait_log("listening at")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stdout.readline() == b"the device does not come to rest\n"
        code, seconds = server.end()
        server.process.stdout.close()
    assert (code, seconds < 3.0) == (1, True), server.log
    assert "the second signal: ending by force" in server.log
    assert not (folder / "edu.sock").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("members", "code", "limit", "words"),
    [
        ('{"aclose": for_ever}', 1, 9.0, "closing the plugin's device was cut short"),
        ('{"aclose": stuck}', 1, 9.0, "in stuck"),
        ('{"aclose": in_a_thread}', 1, 9.0, "not at rest after 5 s, by something that cannot be interrupted"),
        ('{"reset": in_a_thread}', 1, 9.0, "not at rest after 5 s, by something that cannot be interrupted"),
        ('{"reset": shielded}', 1, 9.0, "not at rest after 5 s, by something that cannot be interrupted"),
        ('{"reset": for_ever}', 1, 9.0, "could not be brought back after its last client: it took longer than 3 s"),
    ],
)
def test_device_that_does_not_come_to_rest(folder, members, code, limit, words) -> None:
    site = changed(folder, members)
    options = ("--plugin", "changed", "--device-socket", folder / "model.sock", "--socket-path", folder / "edu.sock")
    with edu_model(folder), Server(*options, sites=[site]) as server:
        server.wait_log("listening at")
        with client_of(folder / "edu.sock"):
            ended, seconds = server.end(seconds=10)
    assert (ended, seconds < limit) == (code, True), server.log
    assert words in server.log
    assert not (folder / "edu.sock").exists()


def test_device_that_does_not_reset_is_told(folder) -> None:
    site = changed(folder, '{"reset": refuses}')
    options = ("--plugin", "changed", "--device-socket", folder / "model.sock", "--socket-path", folder / "edu.sock")
    with edu_model(folder), Server(*options, sites=[site]) as server:
        server.wait_log("listening at")
        client_of(folder / "edu.sock").close()
        server.wait_log("could not be brought back after its last client: no reset")
        with pytest.raises(ReplyError) as caught:
            client_of(folder / "edu.sock")
        assert caught.value.errno == errno.ENODEV
        assert server.end()[0] == 1


def test_step_back_that_fails_does_not_keep_the_next(folder) -> None:
    site = changed(folder, '{"aclose": fails}')
    options = ("--plugin", "changed", "--device-socket", folder / "model.sock", "--socket-path", folder / "edu.sock")
    with edu_model(folder) as model, Server(*options, sites=[site]) as server:
        server.wait_log("listening at")
        code, _ = server.end()
        assert code == 0
        assert "closing the plugin's device: a bug" in server.log
        assert model.poll() is None  # not ours
    assert not (folder / "edu.sock").exists()


class edu_model:  # noqa: N801
    """QEMU's edu as a server of its own at `model.sock`."""

    def __init__(self, folder) -> None:
        path = str(folder / "model.sock")
        arguments = [sys.executable, "-m", "plugins.generic_dmaq.models", "edu", "--socket-path", path]
        self.process = subprocess.Popen(arguments, env=environment(), cwd=TREE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline().startswith(b"ready ")

    def __enter__(self) -> subprocess.Popen:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_inherited_listener(folder) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "given.sock"))
        listener.listen()
        fd = listener.fileno()
        with Server(*EDU, "--fd", fd, popen={"pass_fds": [fd]}) as server:
            with client_of(folder / "given.sock") as client:
                assert edu_id(client) == 0x010000ED
            with client_of(folder / "given.sock") as client:
                assert edu_id(client) == 0x010000ED
            code, _ = server.end()
            assert code == 0
            assert f"listening at --fd {fd}" in server.log
    assert os.listdir(folder) == ["given.sock"]


def test_inherited_connection_is_one_client_and_then_the_end(folder) -> None:
    ours, theirs = socket.socketpair()
    with ours, Server(*EDU, "--fd", theirs.fileno(), popen={"pass_fds": [theirs.fileno()]}) as server:
        theirs.close()
        client = Client(ours)
        client.negotiate()
        assert edu_id(client) == 0x010000ED
        assert server.process.poll() is None
        client.close()
        assert server.wait(5) == 0, server.log


ACTIVATE = """
import os, sys
names, fds, program = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")], sys.argv[3:]
high = [os.dup2(fd, 100 + number) for number, fd in enumerate(fds)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
    os.set_inheritable(3 + number, True)
os.closerange(3 + len(high), 200)
environment = dict(os.environ, LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=names)
os.execve(program[0], program, environment)
"""


def activated(folder, names, fdnames, *arguments) -> subprocess.Popen:
    """The program as systemd starts it: sockets that listen already from fd 3 on, told in LISTEN_*."""
    with contextlib.ExitStack() as stack:
        fds = []
        for name in names:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / f"{name}.sock"))
            listener.listen()
            fds.append(listener.fileno())
        trampoline = [sys.executable, "-c", ACTIVATE, fdnames, ",".join(map(str, fds))]
        return subprocess.Popen(
            [*trampoline, *command(*arguments)],
            env=environment(RUNTIME_DIRECTORY=str(folder)),
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=fds,
        )


@pytest.mark.parametrize(
    ("names", "fdnames", "extra"),
    [
        (("given",), "vfio-user", ("--model", "edu")),
        (("given",), "vfu-server@0000:3b:00.1.socket", ("--model", "edu")),
        (("one", "two"), "ioat:edu", ("--model", "edu", "--model", "ioat")),
        (("one", "two"), "a:b", ("--model", "edu", "--model", "ioat")),
    ],
)
def test_socket_activation(folder, names, fdnames, extra) -> None:
    process = activated(folder, names, fdnames, "--plugin", "generic_dmaq", *extra)
    try:
        edu = folder / f"{'two' if fdnames == 'ioat:edu' else names[0]}.sock"
        with client_of(edu) as client:
            assert edu_id(client) == 0x010000ED
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, log
    assert sorted(os.listdir(folder)) == sorted(f"{name}.sock" for name in names)


@pytest.mark.parametrize(
    "extra", [("--model", "edu", "--socket-path", "{}/other.sock"), ("--model", "edu", "--fd", "3")]
)
def test_activated_socket_without_a_device_is_refused(folder, extra) -> None:
    arguments = [part.format(folder) for part in extra]
    process = activated(folder, ("one", "two"), "x:y", "--plugin", "generic_dmaq", *arguments)
    log = process.communicate(timeout=10)[1]
    assert process.returncode == 5, log
    assert "systemd opened sockets that belong to no device here: " in log
    assert f"{folder}/two.sock" in log
    assert not (folder / "x.sock").exists()
