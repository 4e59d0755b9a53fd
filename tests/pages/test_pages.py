"""The accelerators' lane, and what else goes by the host's page size, with pages of 64 KiB as on many an arm64.

No such kernel is needed: a library that is preloaded stands between all programs and libc, answers that page size and
maps, places and refuses as such a kernel does (`pages.c`). Servers, models and clients are processes of their own, and
all of them have it. (User-mode emulators cannot change the page size any more.)
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("pages.c")
PAGE = 64 << 10
SECONDS = 900
LANE = (
    "tests/pages/test_places.py",
    "tests/plugins/hns",
    "tests/plugins/hns_model/test_process.py",
    "tests/data_plane/test_dirty.py",
    "tests/data_plane/test_reset.py",
)
PROBE = """
import mmap, os, sys
from vfu_server.testing import GuestMemory
fd = os.memfd_create("x")
os.ftruncate(fd, 1 << 20)
mmap.mmap(fd, 4096, offset=65536).close()
for offset in (4096, 32768):
    try:
        mmap.mmap(fd, 4096, offset=offset)
    except OSError as error:
        print(error.errno, end=" ")
try:
    GuestMemory.of(4096)
except ValueError:
    print("ValueError", end=" ")
print(mmap.PAGESIZE, os.sysconf("SC_PAGE_SIZE"))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """`pages.c`, compiled."""
    built = tmp_path_factory.mktemp("pages") / "pages.so"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    done = subprocess.run(
        [*compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", built, SOURCE, "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return built


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with that page size, until it has ended."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "VFU_TEST_PAGE": str(PAGE)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TREE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def passes(library: Path, *what: str) -> None:
    done = run(library, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not vm", *what)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_a_program_has_such_pages(library):
    done = run(library, "-c", PROBE)
    assert done.stdout == f"22 22 ValueError {PAGE} {PAGE}\n"


def test_the_places(library):
    passes(library, LANE[0])


@pytest.mark.slow
@pytest.mark.deadline(2 * SECONDS)
def test_the_whole_lane(library):
    passes(library, *LANE)
