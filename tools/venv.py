"""Owns the virtual environment of the checkout: what pyproject.toml declares, kept in the cache, reached as `.venv`.

The environment is keyed by interpreter and requirements, so all checkouts that declare the same share one, and a
changed pyproject.toml means another one. It holds no package of ours: the checkout is used as it lies. Runs on a bare
interpreter: standard library only.
"""

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE))

from vfu_server.libvfio_user.upstream import cache  # noqa: E402

LINK = TREE / ".venv"
KIND = "venv"


def requirements() -> list[str]:
    """Everything that building, running, testing and checking the project needs, sorted."""
    project = tomllib.loads((TREE / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = {*project["build-system"]["requires"], *project["project"]["dependencies"]}
    return sorted(wanted.union(*project["project"]["optional-dependencies"].values()))


def key(wanted: list[str]) -> str:
    """Names the interpreter for people and, by digest, everything that the environment is made from."""
    base = Path(sys.base_prefix).resolve()
    digest = hashlib.sha256("\n".join([sys.version, str(base), *wanted]).encode()).hexdigest()
    return f"{sys.implementation.cache_tag}-{digest[:16]}"


def environment() -> Path:
    """The finished environment; made once. Raises CalledProcessError when pip fails, whose output has been shown."""
    wanted = requirements()
    found = cache.find(KIND, key(wanted))
    if found and not _runs(found):
        cache.discard(found)
    return cache.entry(KIND, key(wanted), lambda folder: _fill(folder, wanted), in_place=True)


def _fill(folder: Path, wanted: list[str]) -> None:
    print(f"making a virtual environment for Python {sys.version.split()[0]}", flush=True)
    clean = {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    }
    subprocess.run([sys.executable, "-m", "venv", str(folder)], env=clean, check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    subprocess.run([*pip, *wanted], env=clean, check=True)


def _runs(folder: Path) -> bool:
    """False when the interpreter that the environment was made with has gone."""
    try:
        return subprocess.run([str(folder / "bin" / "python"), "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def link(folder: Path) -> None:
    """Let `.venv` point to the environment; a real folder of that name is the user's and is left alone."""
    if LINK.exists() and not LINK.is_symlink():
        raise SystemExit(
            f"error: {LINK} is a folder of your own; move it away, the project puts a link to its cache there"
        )
    if LINK.is_symlink() and LINK.readlink() == folder:
        return
    temporary = LINK.with_name(f".venv.{os.getpid()}")
    temporary.symlink_to(folder)
    temporary.replace(LINK)


if __name__ == "__main__":
    try:
        link(environment())
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"error: the virtual environment could not be made ({error.cmd[2]} failed, see above)"
        ) from None
