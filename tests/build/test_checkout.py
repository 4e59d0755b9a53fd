"""The checkout: `make` explains itself; the environment is what pyproject.toml declares, and is only linked to."""

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tools import venv

TREE = Path(__file__).resolve().parents[2]


def test_make_alone_explains_every_target() -> None:
    shown = subprocess.run(["make", "-C", str(TREE)], capture_output=True, text=True, check=True).stdout
    explained = {line.split()[1] for line in shown.splitlines() if line.startswith("  make ")}
    assert explained >= {"demo", "test", "test-all", "lint", "bench", "wheel", "clean", "help", "setup"}


def test_environment_holds_all_that_the_project_declares() -> None:
    project = tomllib.loads((TREE / "pyproject.toml").read_text())
    wanted = venv.requirements()
    extras = project["project"]["optional-dependencies"]
    for declared in (project["build-system"]["requires"], project["project"]["dependencies"], *extras.values()):
        assert set(declared) <= set(wanted)
    assert venv.key(wanted) == venv.key(list(wanted))
    assert venv.key(wanted) != venv.key([*wanted, "another"])
    assert venv.key(wanted).startswith(sys.implementation.cache_tag)


def test_link_follows_the_environment_and_spares_a_real_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / ".venv"
    monkeypatch.setattr(venv, "LINK", link)
    for name in ("first", "second"):
        venv.link(tmp_path / name)
        assert link.readlink() == tmp_path / name
    link.unlink()
    link.mkdir()
    with pytest.raises(SystemExit, match="is a folder of your own"):
        venv.link(tmp_path / "first")
    assert [path.name for path in tmp_path.iterdir()] == [".venv"]


def test_entry_points_of_the_checkout_are_found() -> None:
    assert "generic_dmaq" in entry_points(group="vfu_server").names
