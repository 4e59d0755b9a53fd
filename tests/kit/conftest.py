"""The package that `vfu-plugin new` writes, made once for all tests here, and a short folder for sockets."""

import sys
from pathlib import Path

import pytest

from tests.server.conftest import folder
from vfu_server.tools.plugin_new import new

__all__ = ["folder"]

NAME = "written_sum"


def installed(site: Path, name: str, target: str) -> None:
    """Make `site` look as pip would leave it: a distribution with one plugin."""
    metadata = site / f"{name}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[vfu_server]\n{name} = {target}\n")


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    """The folder of the package."""
    folder = tmp_path_factory.mktemp("new") / NAME
    new(NAME, folder)
    installed(folder, NAME, NAME)
    return folder


@pytest.fixture
def importable(written, monkeypatch):
    """The package can be imported, and is a plugin that is installed."""
    monkeypatch.syspath_prepend(str(written))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield written
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (NAME, "spoilt"):
            del sys.modules[name]
