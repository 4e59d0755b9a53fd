"""What holds for every test in this folder: it shares machines with others, and has the time that those take."""

from pathlib import Path

import pytest

from tests.vm.lane import SECONDS, Machines, Run
from tools.vm.kernel import KERNELS, is_made

HERE = Path(__file__).resolve().parent
# A kernel that has to be compiled first takes minutes, and no test can help it.
COMPILING, MARGIN = 5400, 300
collect_ignore = ["guest"]
MACHINES = pytest.StashKey[Machines]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; the hook is called with those of all folders."""
    seconds = SECONDS + MARGIN + (0 if all(map(is_made, KERNELS)) else COMPILING)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.deadline(seconds))


@pytest.fixture(scope="session")
def machines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machines:
    """Those of this session: what its tests want of them is known once all are collected."""
    parameters = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = (found.params.get("run") for found in parameters if found is not None)
    made = Machines((run for run in wanted if isinstance(run, Run)), tmp_path_factory.mktemp)
    request.config.stash[MACHINES] = made
    return made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Tell how long each machine and each script took."""
    if (made := config.stash.get(MACHINES, None)) and made.times:
        terminalreporter.section("machines")
        for line in made.times:
            terminalreporter.write_line(line)
