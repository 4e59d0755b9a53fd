"""Owns what a test does when its lane cannot run on this machine: it says why, and in CI it fails."""

import os
from typing import NoReturn

import pytest


def lane_unavailable(reason: str) -> NoReturn:
    """End the test: a skip with `reason` on a person's machine, a failure in CI, where every lane has to run."""
    if os.environ.get("CI"):
        pytest.fail(f"this lane has to run in CI: {reason}", pytrace=False)
    pytest.skip(reason)
