"""Fixtures of the kernel door's tests."""

import pytest

from tests.host.fake_function import FakeFunction
from tests.host.fake_kernel import FakeKernel
from tests.host.tree import Machine, open_fds

BDF = "0000:00:04.0"


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "root")


@pytest.fixture
def function():
    return FakeFunction(BDF)


@pytest.fixture
def no_leaks():
    before = open_fds()
    yield
    left = {each for each in open_fds() - before if "[eventpoll]" not in each}
    assert not left


@pytest.fixture
def by_group(machine, function, no_leaks):
    """A kernel without device nodes."""
    machine.function(BDF, cdev="vfio0")
    machine.group_nodes()
    fake = FakeKernel(machine.root, function)
    yield fake
    fake.close()


@pytest.fixture
def by_cdev(machine, function, no_leaks):
    """A kernel with device nodes and iommufd, and with the group's node as well."""
    machine.function(BDF, cdev="vfio0")
    machine.group_nodes()
    machine.cdev_nodes()
    fake = FakeKernel(machine.root, function)
    fake.cdevs["vfio0"] = function
    yield fake
    fake.close()


@pytest.fixture(params=["group", "cdev"])
def fake(request):
    """Both, one after the other."""
    return request.getfixturevalue(f"by_{request.param}")
