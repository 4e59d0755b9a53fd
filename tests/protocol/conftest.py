"""Fixtures of the protocol tests."""

import pytest

from tests.protocol.served import Served, fd_count


@pytest.fixture
def served():
    """A device whose fds are all back at the end."""
    before = fd_count()
    served = Served()
    yield served
    served.close()
    assert fd_count() == before
    assert not served.faults


@pytest.fixture
def client(served):
    """A negotiated client of `served`."""
    with served.connect() as client:
        yield client
