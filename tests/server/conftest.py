"""A short folder for sockets: pytest's own paths come near to the 107 bytes that a socket's path may have."""

import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="vfu-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
