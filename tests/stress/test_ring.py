"""The ring of migration data under sanitizers: its own source, in a program of its own, at random."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.server.programs import TREE

CSRC = TREE / "vfu_server" / "libvfio_user" / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.parametrize("seed", [20261122])
def test_every_byte_comes_out_as_it_went_in(tmp_path, seed):
    program = tmp_path / "ring"
    source = Path(__file__).with_name("ring.c")
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    flags = ["-g", "-O1", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", f"-I{CSRC}", *SANITIZERS]
    subprocess.run([*compiler, *flags, source, CSRC / "ring.c", "-lpthread", "-o", program], check=True)
    done = subprocess.run([program, str(seed)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "every byte as it went in\n"), done.stderr
