"""What is measured on: which processor a process is bound to, and whether it may be a real-time one.

One processor for both ends, in real time, gives the pure cost of the software: nothing moves and nothing else runs
there. Two processors give what a VMM sees, and the noise of wake-ups across them.
"""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

PRIORITY = "20"


@dataclass(frozen=True, slots=True)
class Machine:
    """`near` and `far` are processors, the same one where there is only one; `real_time`: SCHED_FIFO is permitted."""

    near: int
    far: int
    real_time: bool

    def bound(self, command: list[str], *, far: bool = False, real_time: bool = True) -> list[str]:
        """`command`, bound to one processor, before all other programs where that is permitted."""
        prefix = ["chrt", "-f", PRIORITY] if real_time and self.real_time else []
        return [*prefix, "taskset", "-c", str(self.far if far else self.near), *command]

    def __str__(self) -> str:
        how = (
            "in real time (SCHED_FIFO)" if self.real_time else "without real-time priority, which is not permitted here"
        )
        return (
            f"{platform.machine()}, {os.cpu_count()} processors, Linux {platform.release()}, Python "
            f"{platform.python_version()}; load {os.getloadavg()[0]:.1f} at the start; bound {how}"
        )


def look() -> Machine:
    """This machine. Raises SystemExit without taskset and chrt."""
    for tool in ("taskset", "chrt"):
        if shutil.which(tool) is None:
            raise SystemExit(f"error: {tool} is missing (Debian: apt-get install util-linux)")
    processors = sorted(os.sched_getaffinity(0))
    permitted = subprocess.run(["chrt", "-f", PRIORITY, "true"], capture_output=True, check=False).returncode == 0
    return Machine(processors[0], processors[-1], permitted)
