"""The listening socket: permissions, stale and live ones, links, inheritance."""

import errno
import logging
import os
import resource
import select
import socket
import stat
import subprocess
import sys
import threading

import pytest
import trio

from tests.server.programs import TREE
from vfu_server import sockets
from vfu_server.errors import UsageError
from vfu_server.exit_codes import SocketError


def stale(path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.close()


def connect(path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    return client


def test_socket_is_for_its_owner_only(folder) -> None:
    os.umask(0)
    try:
        listener = sockets.listen(str(folder / "a.sock"))
        assert os.umask(0) == 0
    finally:
        os.umask(0o022)
    status = (folder / "a.sock").lstat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert os.listdir(folder) == ["a.sock"]
    listener.close()
    assert os.listdir(folder) == []


def test_socket_group(folder) -> None:
    group = next(gid for gid in (1, 12345) if os.geteuid() == 0 or gid in os.getgroups())
    os.umask(0o077)
    try:
        listener = sockets.listen(str(folder / "a.sock"), str(group))
    finally:
        os.umask(0o022)
    status = (folder / "a.sock").lstat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group)
    listener.close()


def test_group_by_name_must_exist(folder) -> None:
    with pytest.raises(UsageError, match="no-such-group-anywhere: there is no such group"):
        sockets.listen(str(folder / "a.sock"), "no-such-group-anywhere")
    assert os.listdir(folder) == []


def test_clients_reach_the_listener_in_order(folder) -> None:
    listener = sockets.listen(str(folder / "a.sock"))
    with connect(folder / "a.sock") as one, connect(folder / "a.sock") as two:
        for client, word in ((one, b"one"), (two, b"two")):
            fd = trio.run(listener.accept)
            assert not os.get_inheritable(fd)
            assert os.get_blocking(fd)
            client.sendall(word)
            assert os.read(fd, 100) == word
            os.close(fd)
    listener.close()


def test_stale_socket_is_replaced(folder) -> None:
    stale(folder / "a.sock")
    listener = sockets.listen(str(folder / "a.sock"))
    connect(folder / "a.sock").close()
    listener.close()


def test_live_socket_is_refused_and_goes_on(folder) -> None:
    first = sockets.listen(str(folder / "a.sock"))
    before = (folder / "a.sock").lstat().st_ino
    with pytest.raises(SocketError, match=r"a live server listens at .*a\.sock: stop it, or choose") as caught:
        sockets.listen(str(folder / "a.sock"))
    assert caught.value.errno == errno.EADDRINUSE
    assert (folder / "a.sock").lstat().st_ino == before
    assert os.listdir(folder) == ["a.sock"]
    os.close(trio.run(first.accept))  # the second server's probe
    with connect(folder / "a.sock"):
        os.close(trio.run(first.accept))
    first.close()


def test_live_socket_with_a_full_backlog_is_refused(folder) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(folder / "a.sock"))
        busy.listen(0)
        clients = [connect(folder / "a.sock")]
        with pytest.raises(SocketError, match="a live server"):
            sockets.listen(str(folder / "a.sock"))
        with pytest.raises(SocketError, match="a live server"):
            sockets.listen(str(folder / "a.sock"))
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.symlink_to("/tmp/vfu-nowhere"), "a symbolic link"),
        (lambda path: path.write_text("precious"), "no socket"),
        (lambda path: path.mkdir(), "a directory"),
        (lambda path: os.mkfifo(path), "no socket"),
    ],
)
def test_other_files_are_left_alone(folder, make, kind) -> None:
    path = folder / "a.sock"
    make(path)
    before = path.lstat()
    with pytest.raises(SocketError, match=f"exists and is {kind}: remove it"):
        sockets.listen(str(path))
    assert path.lstat().st_ino == before.st_ino


def test_link_to_a_stale_socket_is_left_alone(folder) -> None:
    stale(folder / "victim.sock")
    (folder / "a.sock").symlink_to("victim.sock")
    with pytest.raises(SocketError, match="a symbolic link"):
        sockets.listen(str(folder / "a.sock"))
    assert stat.S_ISSOCK((folder / "victim.sock").lstat().st_mode)


def test_path_that_no_client_could_connect_to(folder) -> None:
    path = folder / ("a" * 100)
    with pytest.raises(SocketError, match=r"bytes, a socket's path at most 107: choose a shorter one"):
        sockets.listen(str(path))
    longest = folder / ("a" * (sockets.MAX_PATH - len(str(folder)) - 1))
    listener = sockets.listen(str(longest))
    connect(longest).close()
    listener.close()
    assert os.listdir(folder) == []


def test_missing_folder(folder) -> None:
    with pytest.raises(SocketError, match=r"the directory of .*none/a\.sock does not exist"):
        sockets.listen(str(folder / "none" / "a.sock"))


def test_path_of_another_is_not_removed(folder, caplog) -> None:
    listener = sockets.listen(str(folder / "a.sock"))
    (folder / "a.sock").unlink()
    stale(folder / "a.sock")
    listener.close()
    listener.close()
    assert os.listdir(folder) == ["a.sock"]
    assert "was replaced by another process and is left alone" in caplog.text


def test_of_many_that_start_at_once_one_wins(folder) -> None:
    stale(folder / "a.sock")
    program = (
        "import sys, trio\n"
        "from vfu_server import sockets\n"
        "from vfu_server.exit_codes import SocketError\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try:\n"
        f"    listener = sockets.listen({str(folder / 'a.sock')!r})\n"
        "except SocketError as error:\n"
        "    print(error, flush=True)\n"
        "else:\n"
        "    print('won', flush=True); sys.stdin.readline()\n"
    )
    many = [
        subprocess.Popen([sys.executable, "-c", program], cwd=TREE, text=True, stdin=-1, stdout=-1) for _ in range(4)
    ]
    try:
        assert [one.stdout.readline() for one in many] == ["ready\n"] * 4
        for one in many:
            one.stdin.write("go\n")
            one.stdin.flush()
        answers = [one.stdout.readline() for one in many]
    finally:
        for one in many:
            one.kill()
            one.communicate()
    assert answers.count("won\n") == 1
    assert sum("a live server listens" in answer for answer in answers) == 3


def test_locked_folder_is_told(folder, monkeypatch) -> None:
    import fcntl

    monkeypatch.setattr(sockets, "_LOCK_DEADLINE", 0.05)
    holder = os.open(folder, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(SocketError, match="is locked by another process"):
        sockets.listen(str(folder / "a.sock"))
    os.close(holder)
    sockets.listen(str(folder / "a.sock")).close()


def test_client_waits_while_there_are_no_descriptors(folder, caplog) -> None:
    listener = sockets.listen(str(folder / "a.sock"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    class Told(logging.Handler):
        """Gives descriptors back as soon as the shortage was told."""

        def emit(self, record) -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    handler = Told()
    sockets.logger.addHandler(handler)

    async def starved() -> int:
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        filler = [os.dup(0) for _ in range(highest)]
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0), hard))
        with trio.fail_after(5):
            return await listener.accept()

    with connect(folder / "a.sock"):
        try:
            os.close(trio.run(starved))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            sockets.logger.removeHandler(handler)
    assert "a client has to wait: [Errno 24]" in caplog.text
    listener.close()


def test_adopted_listener_is_not_unlinked(folder) -> None:
    inherited = socket.socket(socket.AF_UNIX)
    inherited.bind(str(folder / "a.sock"))
    inherited.listen()
    os.set_inheritable(inherited.fileno(), True)
    listener = sockets.adopt(inherited.detach(), "--fd 7")
    assert not listener.one_client
    assert not os.get_inheritable(listener.socket.fileno())
    with connect(folder / "a.sock"):
        os.close(trio.run(listener.accept))
    listener.close()
    assert os.listdir(folder) == ["a.sock"]


def test_adopted_connection_is_one_client() -> None:
    ours, theirs = socket.socketpair()
    listener = sockets.adopt(ours.detach(), "--fd 7")
    assert listener.one_client
    fd = listener.take_connection()
    listener.close()
    theirs.sendall(b"hello")
    assert os.get_blocking(fd)
    assert os.read(fd, 10) == b"hello"
    os.close(fd)
    assert select.select([theirs], [], [], 5)[0]
    theirs.close()


def test_what_cannot_be_adopted(folder) -> None:
    regular = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
    datagrams, unconnected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
    network = socket.socket(socket.AF_INET)
    for fd, complaint in (
        (regular, "--fd N is not a socket"),
        (datagrams.fileno(), "--fd N is not a UNIX stream socket"),
        (network.fileno(), "--fd N is not a UNIX stream socket"),
        (unconnected.fileno(), "--fd N neither listens nor is connected"),
        (999999, "--fd N: Bad file descriptor: it was not inherited"),
    ):
        with pytest.raises(SocketError) as caught:
            sockets.adopt(fd, "--fd N")
        assert str(caught.value) == complaint
    for sock in (datagrams, unconnected, network):
        os.fstat(sock.fileno())  # still its owner's
        sock.close()
    os.close(regular)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LISTEN_FDS": "2"},
        {"LISTEN_FDS": "2", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "two", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "-1", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "a:b"},
    ],
)
def test_no_sockets_from_systemd(variables) -> None:
    environ = {**variables, "HOME": "/"}
    assert sockets.activated(environ) == []
    assert environ == {"HOME": "/"}


def test_default_directory(folder, monkeypatch) -> None:
    assert (
        sockets.default_directory({"RUNTIME_DIRECTORY": "/run/x:/run/y", "XDG_RUNTIME_DIR": "/z"}).as_posix()
        == "/run/x"
    )
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert sockets.default_directory({"XDG_RUNTIME_DIR": "/z"}).as_posix() == "/run/vfu"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert sockets.default_directory({"XDG_RUNTIME_DIR": "/z"}).as_posix() == "/z/vfu"
    with pytest.raises(SocketError, match="give --socket-path"):
        sockets.default_directory({})
    sockets.make_default_directory(folder / "vfu")
    sockets.make_default_directory(folder / "vfu")
    assert stat.S_IMODE((folder / "vfu").stat().st_mode) == 0o700
    with pytest.raises(SocketError, match="cannot make"):
        sockets.make_default_directory(folder / "none" / "vfu")


def test_path_is_seen_only_when_it_listens(folder) -> None:
    """A client that connects as soon as the path is there is never refused."""
    answers: list[str] = []

    def impatient(path, begun) -> None:
        begun.set()
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(path)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    answers.append(str(error))
                else:
                    answers.append("connected")
            return

    for number in range(50):
        begun = threading.Event()
        thread = threading.Thread(target=impatient, args=(str(folder / f"{number}.sock"), begun))
        thread.start()
        begun.wait()
        listener = sockets.listen(str(folder / f"{number}.sock"))
        thread.join()
        listener.close()
    assert answers == ["connected"] * 50
