"""Memory of real servers while they save and load: the same for 1 MiB of state and for gigabytes."""

import contextlib
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.plugins_synthetic.device import REG_CHANGE_MANY, REG_DIGEST
from tests.plugins_synthetic.serving import serving
from vfu_server.testing import Client, migrate

MIB = 1 << 20
GROWTH = 8 * MIB


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="vfu-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def served(folder, name, **shape):
    """A server of a synthetic device, and its client."""
    with serving(folder, name, **shape) as server, Client.connect(server.path) as client:
        client.negotiate()
        yield server, client


def peak(server):
    """Bytes of memory that the process has held at most."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def move(folder, size, *, pre_copy):
    """Move a device of `size` bytes; the peaks of source and destination."""
    shape = {"size": size, "page": MIB, "pre_copy": pre_copy}
    with served(folder, "a", **shape) as (here, source), served(folder, "b", **shape) as (there, destination):
        source.write(0, REG_CHANGE_MANY, 4, 1000)
        digest = source.read(0, REG_DIGEST, 8)
        record = migrate(source, destination)
        assert record.pre_copy_bytes + record.stop_copy_bytes > size
        assert destination.read(0, REG_DIGEST, 8) == digest
        return peak(here), peak(there)


@pytest.mark.parametrize(
    ("size", "pre_copy"),
    [
        (96 * MIB, True),
        pytest.param(1 << 30, False, marks=[pytest.mark.slow, pytest.mark.deadline(120)]),
        pytest.param(4 << 30, True, marks=[pytest.mark.slow, pytest.mark.deadline(300)]),
    ],
)
def test_memory_does_not_grow_with_the_state(folder, size, pre_copy):
    small = move(folder, MIB, pre_copy=pre_copy)
    large = move(folder, size, pre_copy=pre_copy)
    growth = [after - before for before, after in zip(small, large, strict=True)]
    print("growth in bytes, source and destination:", growth)
    assert max(growth) < GROWTH
