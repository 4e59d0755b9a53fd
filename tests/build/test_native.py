"""The native extension: up to date means up to date, and it needs no library that a machine may lack."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vfu_server.libvfio_user import build
from vfu_server.libvfio_user.upstream import locate

TREE = Path(__file__).resolve().parents[2]
# What the loader finds on every Linux with this C library.
ALWAYS_THERE = {"linux-vdso", "libc", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}


def run_build(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vfu_server.libvfio_user.build", *arguments],
        cwd=TREE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def needed_libraries(extension: Path) -> set[str]:
    listing = subprocess.run(["ldd", str(extension)], capture_output=True, text=True, check=True).stdout
    return {re.split(r"\.so", Path(line.split()[0]).name)[0] for line in listing.splitlines()}


def test_second_build_does_nothing() -> None:
    assert run_build().returncode == 0
    (extension,) = build.HERE.glob("_native*.so")
    built = extension.stat().st_mtime_ns
    again = run_build()
    assert (again.returncode, again.stdout) == (0, "the native extension is up to date\n")
    assert extension.stat().st_mtime_ns == built


def test_extension_needs_the_c_library_only() -> None:
    (extension,) = build.HERE.glob("_native*.so")
    assert needed_libraries(extension) <= ALWAYS_THERE


@pytest.mark.parametrize("changed", ["cdef.h", "csrc/own.c", "csrc/own.h", "csrc/new.c"])
def test_changed_file_means_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(build, "CDEF", tmp_path / "cdef.h")
    (tmp_path / "csrc").mkdir()
    for name in ("cdef.h", "csrc/own.c", "csrc/own.h"):
        (tmp_path / name).write_text("int x;\n")
    source, json = locate.locate(), build.json_c()
    before = build.fingerprint(source, json)
    assert build.fingerprint(source, json) == before
    (tmp_path / changed).write_text("int y;\n")
    assert build.fingerprint(source, json) != before


def test_other_flags_and_other_library_mean_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    source, json = locate.locate(), build.json_c()
    before = build.fingerprint(source, json)
    assert build.fingerprint(source._replace(digest="another"), json) != before
    assert build.fingerprint(source, json._replace(archive=None)) != before
    monkeypatch.setenv("VFU_NATIVE_CFLAGS", "-UNDEBUG")
    assert build.fingerprint(source, json) != before


def test_wrong_source_is_a_message_and_no_traceback(tmp_path: Path) -> None:
    done = run_build(LIBVFIO_USER_SRC=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: LIBVFIO_USER_SRC: {tmp_path} is not libvfio-user's source")
    assert "Traceback" not in done.stderr


def test_missing_compiler_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_build(CC="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the C compiler does not run: no-such-compiler: No such file")
    assert done.stderr.endswith("(Debian: apt-get install gcc)\n")


def test_unknown_argument_is_refused() -> None:
    done = run_build("--fore")
    assert done.returncode == 2
    assert "--force" in done.stdout


def test_warning_in_our_c_files_fails_the_build_in_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(TREE / name, tmp_path)
    for name in ("licenses", "vfu_server"):
        shutil.copytree(TREE / name, tmp_path / name, ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    (tmp_path / "vfu_server/libvfio_user/csrc/sloppy.c").write_text("static int unused(void) { return 1; }\n")
    done = subprocess.run(
        [sys.executable, "-m", "vfu_server.libvfio_user.build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "sloppy.c" in done.stderr
    assert "-Werror=unused-function" in done.stderr
    assert done.stderr.endswith("error: the native extension was not built; the compiler's messages are above\n")
