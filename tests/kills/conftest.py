"""Two servers that all cases share; whoever was killed is started again."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.kills.flow import SHAPE
from tests.kills.sides import Side
from tests.plugins_synthetic.plugin import install_synthetic


@pytest.fixture(scope="session")
def folder():
    path = Path(tempfile.mkdtemp(prefix="vfu-"))
    install_synthetic(path / "site")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def pair(folder):
    sides = [Side(folder, name, **SHAPE) for name in ("source", "destination")]
    yield sides
    for side in sides:
        side.end()
