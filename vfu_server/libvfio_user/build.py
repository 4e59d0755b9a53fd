"""Owns what the native extension is made of: the C files, their flags, the libraries, and when it is up to date.

Nine files of libvfio-user and our own of `csrc/` become one cffi extension (API mode, stable ABI); the library's socket
transport is left out since `csrc/` defines `tran_sock_ops`. json-c is linked statically where the archive is there, so
that an installed wheel needs nothing of this machine.

    python -m vfu_server.libvfio_user.build            builds in place; at once when nothing has changed
    python -m vfu_server.libvfio_user.build --force    builds in any case

Environment: CC; VFU_NATIVE_CFLAGS, added last to every compilation and to the link (`-UNDEBUG`, `-fsanitize=address`).
Must not import the extension, nor anything of the server: it runs inside pip's isolated build.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from cffi import FFI
from cffi import __version__ as cffi_version

from vfu_server.libvfio_user.upstream import cache, locate, revision
from vfu_server.libvfio_user.upstream.revision import Source, SourceError

MODULE = "vfu_server.libvfio_user._native"
HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
CSRC = HERE / "csrc"
CDEF = HERE / "cdef.h"
STAMP = HERE / "_native.stamp"

# NDEBUG on purpose: an assert of the library that a client can reach must not take the server down, and the VM with it.
COMMON_FLAGS = ("-O2", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-DNDEBUG", "-DHAVE_LINUX_KCMP_H", "-fvisibility=hidden")
OWN_FLAGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers")


class JsonC(NamedTuple):
    """Where json-c is: its header folder, and the static archive, or none when it has to be linked dynamically."""

    include: str
    archive: str | None


def ffibuilder() -> FFI:
    """What setuptools asks for (`cffi_modules`): declarations, our sources, flags. Raises SystemExit with a message."""
    try:
        return _builder(locate.locate(), json_c())
    except SourceError as error:
        raise SystemExit(f"error: {error}") from None


def _builder(source: Source, json: JsonC) -> FFI:
    builder = FFI()
    builder.cdef(CDEF.read_text(encoding="utf-8"))
    headers = ["libvfio-user.h", *sorted(path.name for path in CSRC.glob("*.h"))]
    builder.set_source(
        MODULE,
        "".join(f'#include "{header}"\n' for header in headers),
        sources=[str(path.relative_to(TREE)) for path in sorted(CSRC.glob("*.c"))],
        depends=[str(path.relative_to(TREE)) for path in (CDEF, *sorted(CSRC.glob("*.h")))],
        include_dirs=[str(CSRC), *include_dirs(source, json)],
        extra_compile_args=[*common_flags(source), *OWN_FLAGS, *_extra_flags()],
        extra_objects=[json.archive] if json.archive else [],
        libraries=["pthread"] if json.archive else ["json-c", "pthread"],
        # Nothing of json-c may be seen by another copy of it in the process; a symbol that is missing fails at import.
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,-z,now", *_extra_flags()],
    )
    return builder


def library_sources(source: Source) -> list[str]:
    """The library's nine C files, absolute."""
    return [str(source.path / "lib" / f"{name}.c") for name in revision.C_FILES]


def include_dirs(source: Source, json: JsonC) -> list[str]:
    """Public and private headers of the library, and json-c's, which the library includes by its bare name."""
    return [str(source.path / "include"), str(source.path / "lib"), json.include]


def common_flags(source: Source) -> list[str]:
    """Flags of every C file; the path of the cache does not get into the binary."""
    return [*COMMON_FLAGS, f"-ffile-prefix-map={source.path}=libvfio-user", f"-ffile-prefix-map={TREE}=."]


def library_flags(source: Source) -> list[str]:
    """Flags of the library's files: its warnings are not ours to fix."""
    return [*common_flags(source), "-w", *_extra_flags()]


def json_c() -> JsonC:
    """Ask the compiler where json-c is. Raises SourceError when its headers are not installed."""
    seen = _compiler("-E", "-M", "-xc", "-", text="#include <json-c/json.h>\n")
    headers = [word for word in seen.replace("\\\n", " ").split() if word.endswith("/json-c/json.h")]
    if not headers:
        raise SourceError("json-c's headers are missing (Debian: apt-get install libjson-c-dev)")
    archive = _compiler("-print-file-name=libjson-c.a").strip()
    return JsonC(str(Path(headers[0]).parent), archive if Path(archive).is_absolute() else None)


def _compiler(*arguments: str, text: str = "") -> str:
    command = [*shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"), *arguments]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SourceError(
            f"the C compiler does not run: {command[0]}: {error.strerror} (Debian: apt-get install gcc)"
        ) from None
    return done.stdout if done.returncode == 0 else ""


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("VFU_NATIVE_CFLAGS", ""))


def fingerprint(source: Source, json: JsonC) -> str:
    """Digest of everything that the extension is made from, the tools and flags included."""
    digest = hashlib.sha256()
    for fact in (
        source.digest,
        cffi_version,
        sys.version,
        _compiler("--version"),
        *json,
        *common_flags(source),
        *OWN_FLAGS,
        *_extra_flags(),
    ):
        digest.update(f"{fact}\0".encode())
    own = [CDEF, *sorted(CSRC.glob("*.[ch]")), Path(__file__).resolve(), TREE / "setup.py"]
    for path in own:
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _is_current(mark: str) -> bool:
    built = [path for path in HERE.glob("_native*.so") if path.stat().st_size]
    return bool(built) and STAMP.is_file() and STAMP.read_text() == mark


def build_in_place(*, force: bool = False) -> bool:
    """Build beside this file; False if it was up to date. One build at a time. Raises SourceError."""
    if not CDEF.is_file():
        raise SourceError(f"{CDEF} is missing: this is not a complete checkout")
    source, json = locate.locate(), json_c()
    (TREE / "build").mkdir(exist_ok=True)
    with cache.locked(TREE / "build" / "native.lock", "the native extension"):
        mark = fingerprint(source, json)
        if _is_current(mark) and not force:
            return False
        STAMP.unlink(missing_ok=True)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        environment = {**os.environ, "VFU_WERROR": "1"}
        done = subprocess.run(command, cwd=TREE, env=environment, check=False)
        if done.returncode:
            raise SourceError("the native extension was not built; the compiler's messages are above")
        if subprocess.run([sys.executable, "-c", f"import {MODULE}"], cwd=TREE, check=False).returncode:
            raise SourceError("the native extension was built but cannot be loaded; the loader's message is above")
        STAMP.write_text(mark)
    return True


def main(arguments: list[str]) -> int:
    """Build in place and say what was done; 0 when the extension is there and current."""
    if set(arguments) - {"--force"}:
        print(__doc__)
        return 2
    try:
        built = build_in_place(force="--force" in arguments)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("built the native extension" if built else "the native extension is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
