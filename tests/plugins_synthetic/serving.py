"""Real servers of the synthetic device. Must not know what is tested."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.plugins_synthetic.plugin import install_synthetic, options
from tests.server.programs import Server


@contextlib.contextmanager
def serving(folder: Path, name: str, **shape: float) -> Iterator[Server]:
    """A server in a process of its own; it listens at `server.path` and must end well."""
    site = folder / "site"
    if not site.exists():
        install_synthetic(site)
    path = folder / f"{name}.sock"
    with Server(*options(**shape), "--socket-path", path, sites=[site], TMPDIR=str(folder)) as server:
        server.path = path
        server.wait_log("listening at")
        yield server
        assert server.end()[0] == 0, server.log
