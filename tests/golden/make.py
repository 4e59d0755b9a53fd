"""`python -m tests.golden.make`: saves the golden streams that are not there yet. One that is there is never made anew.

A state version of a plugin that has changed gets a new entry and a new file; the old ones stay.
"""

import sys
import tempfile
from pathlib import Path

from tests.golden.registry import golden


def main() -> int:
    made = 0
    for one in golden():
        if one.path.exists():
            continue
        with tempfile.TemporaryDirectory(prefix="vfu-") as folder:
            data = one.make(Path(folder))
        one.path.parent.mkdir(parents=True, exist_ok=True)
        one.path.write_bytes(data)
        print(f"{one.path}: {len(data)} bytes")
        made += 1
    print(f"{made} made, {len(golden()) - made} were there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
