"""A clock for plugins' tests that jumps ahead when everything sleeps: what takes a device 100 ms takes a test none."""

import pytest
from trio.testing import MockClock


@pytest.fixture
def autojump_clock() -> MockClock:
    """For `trio.testing.trio_test`, which runs the test under it."""
    return MockClock(autojump_threshold=0)
