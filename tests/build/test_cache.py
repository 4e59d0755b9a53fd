"""The cache: an entry is there whole or not at all, one process makes it, and nothing half-made is ever used."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vfu_server.libvfio_user.upstream import cache

TREE = Path(__file__).resolve().parents[2]

# Fills an entry and reports each step on its standard output; goes on when its standard input says so.
FILLER = """
import sys
from vfu_server.libvfio_user.upstream import cache
def fill(folder):
    (folder / "content").write_text(sys.argv[2])
    print("filling", flush=True)
    sys.stdin.readline()
print((cache.entry("kind", "key", fill, in_place=sys.argv[1] == "in-place") / "content").read_text(), flush=True)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VFU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def filler(how: str, content: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", FILLER, how, content],
        cwd=TREE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_entry_is_made_once() -> None:
    calls: list[Path] = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "content").write_text("here")

    assert cache.find("kind", "key") is None
    first = cache.entry("kind", "key", fill)
    assert cache.entry("kind", "key", fill) == first == cache.find("kind", "key")
    assert (first / "content").read_text() == "here"
    assert len(calls) == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_failed_fill_leaves_nothing(own_cache: Path, in_place: bool) -> None:
    def fill(folder: Path) -> None:
        (folder / "content").write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        cache.entry("kind", "key", fill, in_place=in_place)
    assert cache.find("kind", "key") is None
    assert [path.name for path in (own_cache / "kind").iterdir()] == [".key.lock"]


@pytest.mark.parametrize("how", ["aside", "in-place"])
def test_killed_run_is_made_good(how: str) -> None:
    victim = filler(how, "first")
    assert victim.stdout is not None
    assert victim.stdout.readline() == "filling\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert cache.find("kind", "key") is None
    output, _ = filler(how, "second").communicate("\n")
    assert output == "filling\nsecond\n"


def test_what_a_killed_run_left_is_removed_by_the_next_start_whatever_it_makes(own_cache: Path) -> None:
    """As after a change of the patches: that entry is never asked for again."""
    cache.entry("kind", "other", lambda folder: None)
    victim = filler("aside", "first")
    assert victim.stdout is not None
    assert victim.stdout.readline() == "filling\n"
    assert (own_cache / "kind" / ".key.partial" / "content").is_file()
    cache.entry("kind", "other", lambda folder: None)
    assert (own_cache / "kind" / ".key.partial" / "content").is_file(), "somebody is at it"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    cache.entry("kind", "other", lambda folder: None)
    assert not (own_cache / "kind" / ".key.partial").exists()


def test_second_run_waits_and_takes_what_the_first_made() -> None:
    first = filler("aside", "first")
    assert first.stdout is not None
    assert first.stdout.readline() == "filling\n"
    second = filler("aside", "second")
    assert second.stderr is not None
    assert "waiting for another run" in second.stderr.readline()
    assert first.communicate("\n")[0] == "first\n"
    assert second.communicate("\n")[0] == "first\n"


def test_folder_without_its_mark_is_not_trusted(own_cache: Path) -> None:
    half = own_cache / "kind" / "key"
    half.mkdir(parents=True)
    (half / "content").write_text("half")
    made = cache.entry("kind", "key", lambda folder: None)
    assert made == half
    assert os.listdir(made) == [cache.DONE]


def test_discarded_entry_is_made_anew() -> None:
    made = cache.entry("kind", "key", lambda folder: None)
    cache.discard(made)
    assert cache.find("kind", "key") is None


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFU_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_root() == Path("/somewhere/vfu-server")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache.cache_root() == Path("/home/somebody/.cache/vfu-server")
