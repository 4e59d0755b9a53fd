"""The example from outside of our tree is a package that pip could install, is found by its entry point, and passes the
conformance suite. Its own tests are collected with ours.
"""

import subprocess
import sys
import tomllib

import pytest

from tests.deadline import SECONDS
from tests.kit.conftest import installed
from tests.server.programs import TREE, environment

EXAMPLE = TREE / "examples" / "e1000e"
QUICK = ("declarations", "policy", "coroutines", "states", "save-twice", "load", "verified", "stopped")


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """What pip would have put on Python's path."""
    point = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]["vfu_server"]
    ((name, target),) = point.items()
    site = tmp_path_factory.mktemp("site")
    installed(site, name, target)
    return [EXAMPLE, site]


def run(sites, module, *arguments):
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        env=environment(*sites, COLUMNS="200", PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=SECONDS * 4,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_a_project_that_setuptools_knows():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == ["e1000e"]
    assert project["project"]["dependencies"] == ["vfu-server"]


def test_it_is_listed_by_its_entry_point(sites):
    assert "e1000e 0.1 (e1000e)" in run(sites, "vfu_server.tools.plugin", "list")


def test_its_policy_covers_every_byte(sites):
    shown = run(sites, "vfu_server", "--plugin", "e1000e", "--show-policy")
    assert "TX[0].TDT" in shown
    assert "not declared" not in shown


@pytest.mark.deadline(240)
def test_it_passes_the_quick_checks(sites):
    only = [word for name in QUICK for word in ("--only", name)]
    assert f"{len(QUICK)} checks: {len(QUICK)} passed" in run(
        sites, "vfu_server.tools.plugin", "check", "e1000e", *only
    )


@pytest.mark.slow
@pytest.mark.deadline(600)
def test_it_passes_the_conformance_suite(sites):
    assert " failed" not in run(sites, "vfu_server.tools.plugin", "check", "e1000e").splitlines()[-1]
