"""Starts the real program for tests, with plugin packages made on the spot. Must not know what is tested."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

TREE = Path(__file__).resolve().parents[2]

PROBE = """
from vfu_server.hookspecs import hookimpl

VFU_SERVER_API = 1

@hookimpl
def vfu_server_probe(host, options):
    return None
"""


def install(site: Path, distribution: str, modules: dict[str, str], *, version="1.0", plugins=None) -> Path:
    """Put a distribution into folder `site`: modules by name, entry points `plugins` (default: each module)."""
    site.mkdir(exist_ok=True)
    for name, source in modules.items():
        (site / f"{name}.py").write_text(source)
    metadata = site / f"{distribution}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n\nWords.\n")
    points = plugins if plugins is not None else {name: name for name in modules}
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (metadata / "entry_points.txt").write_text(f"[console_scripts]\nx = y:z\n\n[vfu_server]\n{lines}\n[other]\na = b\n")
    return site


def environment(*sites: Path, **extra: str) -> dict[str, str]:
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("VFU_", "NOTIFY_", "LISTEN_", "XDG_"))
    }
    env["PYTHONPATH"] = os.pathsep.join([str(TREE), *map(str, sites)])
    return env | extra


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "vfu_server", *map(str, arguments)]


def run(*arguments: object, sites=(), **extra: str) -> subprocess.CompletedProcess[str]:
    """The program, until it has ended by itself."""
    return subprocess.run(
        command(*arguments), env=environment(*sites, **extra), capture_output=True, text=True, timeout=120, check=False
    )


class Server:
    """The program while it serves; killed at the end of the `with` if it still runs."""

    def __init__(self, *arguments: object, sites=(), popen=None, **extra: str) -> None:
        self.process = subprocess.Popen(
            command(*arguments), env=environment(*sites, **extra), stderr=subprocess.PIPE, **(popen or {})
        )
        self.log = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate()

    def wait_log(self, text: str, seconds: float = 15.0) -> str:
        """Read the log until `text` is in it."""
        deadline = time.monotonic() + seconds
        while text not in self.log:
            left = deadline - time.monotonic()
            readable = left > 0 and select.select([self.process.stderr], [], [], left)[0]
            chunk = os.read(self.process.stderr.fileno(), 65536) if readable else b""
            if not chunk:
                raise AssertionError(f"{text!r} is not in the log:\n{self.log}")
            self.log += chunk.decode()
        return self.log

    def end(self, number: int = signal.SIGTERM, seconds: float = 5.0) -> tuple[int, float]:
        """Send a signal; the exit code, and the seconds until then."""
        start = time.monotonic()
        self.process.send_signal(number)
        return self.wait(seconds), time.monotonic() - start

    def wait(self, seconds: float = 10.0) -> int:
        """The exit code; the rest of the log is read."""
        self.log += self.process.communicate(timeout=seconds)[1].decode()
        return self.process.returncode
