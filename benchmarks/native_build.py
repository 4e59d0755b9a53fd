"""Compiles the peer and the load from the source of libvfio-user that the build of the server has checked.

The library is taken whole for the peer, with its own socket transport, and unmodified.
"""

import os
import shlex
import subprocess
from pathlib import Path

from vfu_server.libvfio_user import build
from vfu_server.libvfio_user.upstream import locate
from vfu_server.libvfio_user.upstream.revision import SourceError

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "bench"
WARNINGS = ("-Wall", "-Wextra", "-Wno-stringop-truncation")


def program(name: str) -> Path:
    """Where the program is once it was built."""
    return OUT / name


def build_all() -> None:
    """Build everything; takes a few seconds. Raises SystemExit with the compiler's words."""
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        source, json_c = locate.locate(), build.json_c()
    except SourceError as error:
        raise SystemExit(f"error: {error}") from None
    flags = [*build.common_flags(source), *(f"-I{folder}" for folder in build.include_dirs(source, json_c))]
    objects = []
    for file in (*build.library_sources(source), str(source.path / "lib" / "tran_sock.c")):
        objects.append(str(OUT / f"{Path(file).stem}.o"))
        _compile([*flags, "-w", "-c", file, "-o", objects[-1]])
    json_library = [json_c.archive] if json_c.archive else ["-ljson-c"]
    _compile(
        [*flags, *WARNINGS, str(_native("peer")), *objects, *json_library, "-lpthread", "-o", str(program("peer"))]
    )
    for name in ("client", "loop", "bitmap"):
        _compile(["-O2", "-D_GNU_SOURCE", *WARNINGS, str(_native(name)), "-o", str(program(name))])


def _native(name: str) -> Path:
    return HERE / "native" / f"{name}.c"


def _compile(arguments: list[str]) -> None:
    command = [*shlex.split(os.environ.get("CC", "gcc")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {shlex.join(command)}\n{done.stderr}")
