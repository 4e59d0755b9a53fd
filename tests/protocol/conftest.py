"""Fixtures of the protocol tests."""

import gc
import os
import select
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.model_process import ModelProcess
from tests.protocol.served import Served, open_files
from tests.server.programs import Server
from vfu_server.testing import Client, Guest


@pytest.fixture(scope="module", autouse=True)
def nothing_forgotten():
    """What earlier modules forgot to close is gone before fds are counted."""
    gc.collect()


@pytest.fixture
def served():
    """A device whose fds are all back at the end."""
    before = open_files()
    served = Served()
    yield served
    served.close()
    assert open_files().items() <= before.items()
    assert not served.faults


@pytest.fixture
def client(served):
    """A negotiated client of `served`."""
    with served.connect() as client:
        yield client


class EduServer(Server):
    """The real server before an edu model, whose time is scaled, and what the kernel says of the server's process."""

    def __init__(self, folder, time_scale):
        self.model = ModelProcess(Path(folder), "edu", time_scale=time_scale)
        self.path = f"{folder}/edu.sock"
        super().__init__("--plugin", "generic_dmaq", "--device-socket", self.model.path, "--socket-path", self.path)
        os.set_blocking(self.process.stderr.fileno(), False)

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.model.close()

    def connect(self, memory=None, **how):
        """A guest, not yet started."""
        assert self.process.poll() is None, "\n".join(["the server has ended:", *self.read_log()])
        return Guest.connect(self.path, memory, **how)

    def fds(self):
        """How many file descriptors it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self):
        """How many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def resident(self):
        """Bytes of memory that it holds."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def wait_fds(self, wanted):
        """Until it has `wanted` fds open: it closes some only after it has answered."""
        deadline = time.monotonic() + 5
        while self.fds() != wanted:
            assert time.monotonic() < deadline, f"{self.fds()} file descriptors are open, not {wanted}"
            select.select([], [], [], 0.01)

    def idle(self):
        """(fds, threads, resident bytes) while it has a client that has just negotiated."""
        with Client.connect(self.path) as client:
            client.negotiate()
            client.get_info()
            return self.fds(), self.threads(), self.resident()

    def read_log(self):
        """The lines of its log up to now."""
        while chunk := self.process.stderr.read(1 << 20):
            self.log += chunk.decode()
        return self.log.splitlines()


@contextmanager
def running_edu_server(time_scale):
    with tempfile.TemporaryDirectory(prefix="vfu-") as folder, EduServer(folder, time_scale) as server:
        server.wait_log("listening")
        yield server
        assert server.end()[0] == 0


@pytest.fixture(scope="session")
def edu_server():
    """The real server with the edu model, in processes of their own; `connect()` gives a guest, not yet started."""
    with running_edu_server(0.05) as server:
        yield server


@pytest.fixture
def slow_edu():
    """A started guest of a server whose edu model takes 300 ms for a transfer."""
    with running_edu_server(3.0) as server, server.connect() as guest:
        guest.server = server
        yield guest.start()


@pytest.fixture
def edu(edu_server):
    """A started guest of the edu server."""
    with edu_server.connect() as guest:
        yield guest.start()


@pytest.fixture(scope="module")
def shared_edu(edu_server):
    """A started guest that all tests of a module share: they must leave it as it was."""
    with edu_server.connect() as guest:
        yield guest.start()
