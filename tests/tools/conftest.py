"""Servers of a synthetic device for the tools, and a stream of each plugin."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.plugins_synthetic.serving import serving
from tests.server.programs import environment


@pytest.fixture(scope="session")
def site():
    """A short folder for sockets, in which the synthetic plugin is installed as well."""
    path = Path(tempfile.mkdtemp(prefix="vfu-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def servers(site):
    """(source, destination): real servers of a device of 8 MiB that can pre-copy."""
    shape = {"size": 8 << 20, "pre_copy": True, "p2p": True}
    with serving(site, "a", **shape) as source, serving(site, "b", **shape) as destination:
        yield source, destination


def tool(name, *arguments, site=None, **how):
    """Run a tool as a program; (exit code, standard output, standard error)."""
    command = [sys.executable, "-P", "-m", f"vfu_server.tools.{name}", *map(str, arguments)]
    env = environment(*([site / "site"] if site else []))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False, **how)
    return done.returncode, done.stdout, done.stderr
