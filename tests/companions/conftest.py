"""The plugin of docs/plugins/companions.md as an installed package `acme_vf`, and a short folder for sockets."""

import re

import pytest

from tests.documents import TREE, blocks
from tests.server.conftest import folder
from tests.server.programs import install

__all__ = ["folder", "site"]

PLUGIN = """
from vfu_server.device import ModelCommand
from vfu_server.hookspecs import hookimpl
from acme_vf.device import AcmeVf

VFU_SERVER_API = 1

@hookimpl
def vfu_server_probe(host, options):
    return AcmeVf(host, options.get("pf", "pf")) if host.identity().device == 0x10F1 else None

@hookimpl
def vfu_server_models():
    return {"acme-vf": ModelCommand("tests.companions.functions", "two VFs and their PF")}
"""


@pytest.fixture
def site(folder):
    """Where the package is installed."""
    path = install(folder / "site", "acme", {}, plugins={"acme_vf": "acme_vf", "acme_vf_first": "acme_vf_first"})
    package = path / "acme_vf"
    package.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    hook = ""
    for block in blocks(TREE / "docs" / "plugins" / "companions.md", "python"):
        if name := re.match(r"# acme_vf/(\w+\.py)\n", block.body):
            (package / name[1]).write_text(block.body)
        else:
            hook += block.body
    assert "vfu_server_companions" in hook
    # The document's hook leaves sockets alone; this one does not, since kernel VFIO is not needed to see the order.
    first = hook.replace('if "/" in where else', "if not where else")
    assert first != hook
    (path / "acme_vf_first.py").write_text(PLUGIN + first)
    return path
