"""Servers that the tests of this folder share. Whoever makes a model misbehave starts one of their own."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.plugins.hns.served import Served


@pytest.fixture
def folder():
    """A short one: a socket's path has 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vfu-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def pair(folder):
    """Two servers of a ZIP VF each; what they say at their end is looked at."""
    with Served(folder / "a") as source, Served(folder / "b") as target:
        yield source, target
        for server in (source, target):
            assert server.end()[0] == 0, server.log
            assert "Traceback" not in server.log, server.log
