"""Linux's own tests of VFIO: on the functions that our tests use, and in a guest on a function that we present."""

import pytest

from tests.vm.inner_files import INNER, SELFTESTS
from tests.vm.lane import Machines, Run, each_check


@each_check("selftests.py", (SELFTESTS, []))
def test_functions(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)


@pytest.mark.slow
@each_check("inner_selftests.py", (INNER, []))
def test_presented_function(machines: Machines, run: Run, check: str) -> None:
    machines.checks(run).judge(check)
