"""Owns running several scripts of checks in one machine, each as if it were the first: `in_turn.py FOLDER JSON`.

JSON is a list of commands, script and arguments. What each says is kept in /results/FOLDER-NUMBER, and the time that it
took. Whoever comes next finds no function with vfio-pci, no mediated device, and the device nodes as at the start.
"""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

from tests.vm.guest import pci

SCRIPTS, RESULTS = Path(__file__).resolve().parent, Path("/results")
MEDIATED = Path("/sys/bus/mdev/devices")
NODES = ("/dev/iommu",)


def run(command: list[str], folder: Path) -> int:
    """One script to its end; its exit status."""
    folder.mkdir()
    began = time.monotonic()
    with open(folder / "stdout", "wb") as output, open(folder / "stderr", "wb") as errors:
        environment = os.environ | {"VFU_CHECKS": str(folder / "checks")}
        argv = [sys.executable, str(SCRIPTS / command[0]), *command[1:]]
        status = subprocess.run(argv, env=environment, stdout=output, stderr=errors, check=False).returncode
    (folder / "ended").write_text(json.dumps({"status": status, "seconds": round(time.monotonic() - began, 1)}))
    return status


def clear_away(nodes: dict[str, os.stat_result]) -> None:
    """Make the machine what it was, as far as scripts rely on it."""
    for device in sorted(MEDIATED.iterdir()) if MEDIATED.exists() else []:
        (device / "remove").write_text("1")
    for device in sorted(pci.DEVICES.iterdir()):
        if pci.driver(device.name) == "vfio-pci":
            pci.unbind(device.name)
        if (device / "driver_override").read_text().strip() not in ("", "(null)"):
            (device / "driver_override").write_text("\n")
    for path, was in nodes.items():
        if not os.path.exists(path):
            os.mknod(path, stat.S_IFCHR | 0o600, was.st_rdev)


def main() -> None:
    """Run them all. Fails if any has."""
    name, commands = sys.argv[1], json.loads(sys.argv[2])
    nodes = {path: os.stat(path) for path in NODES if os.path.exists(path)}
    failed = 0
    for number, command in enumerate(commands):
        failed += bool(run(command, RESULTS / f"{name}-{number}"))
        clear_away(nodes)
    sys.exit(bool(failed))


main()
