"""The first step of a model's process: `python -m ...server_model_child PARENT MODULE ARGS...` becomes MODULE.

Bound to its parent's life first, whatever way the parent ends. It imports nothing of ours, so that the model starts
as fast as alone.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def become(parent: int, module: str, arguments: list[str]) -> None:
    """Die with process `parent`; until then run `module` as the main program."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(1)  # it died before we could ask
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
