"""Servers that the tests of this folder share. Whoever makes a model misbehave starts one of their own."""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.served import Served
from vfu_server.testing import GuestMemory

EDU_SCALE = 0.01
"""A transfer takes 1 ms."""


@contextmanager
def _folder():
    path = Path(tempfile.mkdtemp(prefix="vfu-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def running(model, *arguments, scale):
    with _folder() as folder, Served(folder, model, *arguments, time_scale=scale) as server:
        yield server
        assert server.end()[0] == 0, server.log
        assert "Traceback" not in server.log


@pytest.fixture
def folder():
    """A short one: a socket's path has 107 bytes."""
    with _folder() as path:
        yield path


@pytest.fixture(scope="session")
def edu_source():
    with running("edu", scale=EDU_SCALE) as server:
        yield server


@pytest.fixture(scope="session")
def edu_target():
    with running("edu", scale=EDU_SCALE) as server:
        yield server


@pytest.fixture(scope="session")
def ioat_source():
    with running("ioat", "--channels", "2", scale=1.0) as server:
        yield server


@pytest.fixture(scope="session")
def ioat_target():
    with running("ioat", "--channels", "2", scale=1.0) as server:
        yield server


@pytest.fixture
def edu(edu_source):
    """A guest at work at `edu_source`."""
    with edu_source.connect() as guest:
        yield guest.start()


@pytest.fixture
def ioat(ioat_source):
    """A guest at work at `ioat_source`."""
    with ioat_source.connect() as guest:
        yield guest.start()


@pytest.fixture
def edu_arrival(edu_target):
    """A guest at `edu_target`, plugged in and reset, with its own memory: somebody is about to move there."""
    yield from _arrival(edu_target)


@pytest.fixture
def ioat_arrival(ioat_target):
    """A guest at `ioat_target`, as `edu_arrival`."""
    yield from _arrival(ioat_target)


def _arrival(server):
    with GuestMemory.of(16 << 20) as memory, server.connect(memory) as guest:
        guest.plug_in()
        guest.machine_reset()
        yield guest
