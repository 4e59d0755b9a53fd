"""A server that gets no more memory (RLIMIT_AS) amid a migration: refused with an errno, the guest goes on, and so does
the server; with memory again the same migration goes through.
"""

import contextlib
import resource

import pytest

from tests.kills.sides import SECONDS, Side, address_space
from tests.plugins_synthetic.device import REG_CHANGE_MANY, REG_DIGEST
from vfu_server.errors import VfuServerError
from vfu_server.testing import Client, migrate
from vfu_server.uapi import MigState

MIB = 1 << 20
SHAPES = {
    "large sections": {"size": 48 * MIB, "page": 16 * MIB},
    "pre-copy": {"size": 12 * MIB, "page": 2 * MIB, "pre_copy": True},
}
MARGINS = (0, 1, 2, 3, 5, 9, 14, 20, 30, 45)
"""MiB above what the server has when the migration begins."""
EVERY = 6


@pytest.fixture(scope="module", params=SHAPES)
def limited(folder, request):
    sides = [Side(folder, f"{name}-{list(SHAPES).index(request.param)}", **SHAPES[request.param]) for name in "ab"]
    yield sides
    for side in sides:
        side.end()


@contextlib.contextmanager
def limit(side, margin):
    """No more than `margin` MiB from now on."""
    before = resource.prlimit(side.pid, resource.RLIMIT_AS)
    resource.prlimit(side.pid, resource.RLIMIT_AS, (address_space(side.pid) + margin * MIB, before[1]))
    try:
        yield
    finally:
        resource.prlimit(side.pid, resource.RLIMIT_AS, before)


@contextlib.contextmanager
def client_of(side):
    with Client.connect(str(side.path), timeout=SECONDS) as client:
        client.negotiate()
        yield client


@pytest.mark.parametrize(
    ("which", "margin"),
    [
        pytest.param(which, margin, marks=[pytest.mark.slow] if n % EVERY else [], id=f"{name}-{margin}")
        for n, (which, name, margin) in enumerate(
            (which, name, margin) for margin in MARGINS for which, name in enumerate(("source", "destination"))
        )
    ],
)
def test_a_migration_without_memory(limited, which, margin):
    with client_of(limited[0]) as source, client_of(limited[1]) as destination:
        source.write(0, REG_CHANGE_MANY, 4, 7)
        digest = source.read(0, REG_DIGEST, 8)
        with limit(limited[which], margin):
            try:
                migrate(source, destination)
            except VfuServerError as error:
                print(f"{error!r}, {error.__notes__}")
                failed = True
            else:
                failed = False
        for side in limited:
            assert side.alive, side.said()
        if failed:
            if source.mig_state() is not MigState.RUNNING:  # with memory again nothing may be in its way
                source.set_mig_state(MigState.RUNNING)
            assert source.read(0, REG_DIGEST, 8) == digest
            destination.reset()
            migrate(source, destination)
        assert destination.read(0, REG_DIGEST, 8) == digest
        assert source.mig_state() is MigState.STOP
