"""The product under measurement: the real server with the plugin of `plugin.py`, before an edu model."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.native_build import OUT
from benchmarks.processes import TREE, Running, python

METADATA = "Metadata-Version: 2.1\nName: vfu-benchmark\nVersion: 0\n"
ENTRY_POINTS = "[vfu_server]\nbenchmark = benchmarks.plugin\nbenchmark_kernel = benchmarks.kernel_plugin\n"


@dataclass(frozen=True, slots=True)
class Served:
    """A server that listens at `sock`; `control` is its plugin's file."""

    server: Running
    sock: Path
    control: Path

    def set_state(self, *, early: int = 0, late: int = 0, fresh: bool = False) -> None:
        """What its device gives from the next save on, in bytes; see plugin.py."""
        self.control.write_text(json.dumps({"early": early, "late": late, "fresh": fresh}))


@contextlib.contextmanager
def model(where: Path, name: str) -> Iterator[Path]:
    """An edu model as a process; its socket."""
    sock = where / f"{name}-model.sock"
    command = python("-m", "plugins.generic_dmaq.models", "edu", "--socket-path", sock)
    with Running(command, listens=sock):
        yield sock


def site() -> dict[str, str]:
    """The environment in which the server finds the plugin."""
    folder = OUT / "site"
    metadata = folder / "vfu_benchmark-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(METADATA)
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return {"PYTHONPATH": f"{TREE}:{folder}"}


@contextlib.contextmanager
def serve(
    machine: Machine, where: Path, name: str = "state", *, bound: bool = True, plugin: str = "benchmark"
) -> Iterator[Served]:
    """The server, with a device of its own."""
    sock, control = where / f"{name}.sock", where / f"{name}.json"
    with model(where, name) as device:
        command = python("-m", "vfu_server", "--plugin", plugin, "--option", f"control={control}")
        command += ["--device-socket", str(device), "--socket-path", str(sock), "--log-level", "warning"]
        if bound:
            command = machine.bound(command)
        with Running(command, listens=sock, environment=site()) as server:
            served = Served(server, sock, control)
            served.set_state()
            yield served
