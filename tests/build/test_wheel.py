"""The wheel: built as pip builds it, it runs in a fresh environment that knows neither tree, source nor cache."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
LEFTOVERS = (
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "_native*.so",
    "_native*.c",
    "_native.stamp",
    "__pycache__",
    ".*_cache",
)
PIP = ("-m", "pip", "-qq", "--disable-pip-version-check")

pytestmark = [pytest.mark.slow, pytest.mark.package, pytest.mark.deadline(300)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in pip's isolated build environment, from a copy without anything that was built in place."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = shutil.copytree(TREE, folder / "tree", ignore=shutil.ignore_patterns(*LEFTOVERS))
    subprocess.run([sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", str(folder), str(tree)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command of a fresh environment that holds nothing but the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    subprocess.run([str(folder / "venv/bin/python"), *PIP, "install", str(wheel)], check=True)
    empty = folder / "empty"
    empty.mkdir()

    def run(program: str, *arguments: str) -> str:
        environment = {"HOME": str(empty), "PATH": "/nowhere"}
        command = [str(folder / "venv/bin" / program), *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert os.listdir(empty) == []
        return done.stdout

    return run


def test_wheel_holds_what_runs_and_the_licences(wheel: Path) -> None:
    assert re.fullmatch(r"vfu_server-[\d.]+-cp311-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        extension = archive.read("vfu_server/libvfio_user/_native.abi3.so")
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"vfu_server", "plugins"}
    assert "vfu_server/py.typed" in names
    templates = [name for name in names if name.startswith("vfu_server/tools/plugin_template/")]
    assert len(templates) == 8
    for notice in ("LICENSE", "licenses/libvfio-user.txt", "licenses/json-c.txt"):
        assert any(name.endswith(f".dist-info/licenses/{notice}") for name in names)
    assert not [name for name in names if name.endswith((".c", "_native.stamp")) or "/tests/" in name]
    assert os.fsencode(Path.home() / ".cache") not in extension


def test_command_runs(wheel: Path, installed: Callable[..., str]) -> None:
    version = wheel.name.split("-")[1]
    assert version in installed("vfu-server", "--version")


def test_extension_loads_and_needs_the_c_library_only(installed: Callable[..., str]) -> None:
    show = "import vfu_server.libvfio_user._native as native; print(native.__file__)"
    extension = installed("python", "-c", show).strip()
    listing = subprocess.run(["ldd", extension], capture_output=True, text=True, check=True).stdout
    assert "json-c" not in listing
    assert "not found" not in listing


def test_our_plugins_are_found_and_load(installed: Callable[..., str]) -> None:
    show = (
        "from importlib.metadata import entry_points\n"
        "for point in sorted(entry_points(group='vfu_server'), key=lambda point: point.name):\n"
        "    point.load()\n"
        "    print(point.name)\n"
    )
    assert "generic_dmaq" in installed("python", "-c", show).split()
