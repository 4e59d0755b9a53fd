"""Owns folders with packages of another Debian release, unpacked from the mirror that this machine's apt uses.

A root is made once by mmdebstrap, kept in the cache under a name that its whole specification went into, and read-only
by agreement. Knows nothing of what a root is used for. The variant `extract` unpacks without running anything of the
packages, which needs no root rights; the others set the packages up and do.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vfu_server.libvfio_user.upstream import cache, debian

KIND = "debian-root"
# Raised when this file makes something else out of the same specification.
FORMAT = 1


class RootError(Exception):
    """The root cannot be made here; the message says why and what would help."""


class RootSpec(NamedTuple):
    """What a root consists of: `packages` of `suite`, of which `pinned` come from `suite`-backports.

    `architecture` empty: this machine's. Another one's packages can only be unpacked (variant `extract`).
    """

    name: str
    suite: str
    packages: tuple[str, ...]
    pinned: tuple[str, ...] = ()
    variant: str = "extract"
    architecture: str = ""

    @property
    def key(self) -> str:
        """Names the root in the cache."""
        made_of = repr((FORMAT, self)).replace(", architecture=''", "")  # as it was before there was a choice
        return f"{self.name}-{self.suite}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def debian_root(spec: RootSpec, verify: Callable[[Path], None]) -> Path:
    """The finished root. `verify` looks at a new one before it counts and raises RootError if it will not do."""

    def fill(folder: Path) -> None:
        _bootstrap(spec, folder / "root")
        verify(folder / "root")

    return cache.entry(KIND, spec.key, fill) / "root"


def _bootstrap(spec: RootSpec, root: Path) -> None:
    if not shutil.which("mmdebstrap"):
        raise RootError("mmdebstrap is missing (install it with: tools/system-packages test)")
    privileged = os.geteuid() == 0
    if not privileged and spec.variant != "extract":
        raise RootError(f"the root {spec.name} sets its packages up, for which mmdebstrap has to be run as root")
    mirrors = debian.mirror_uris()
    if not mirrors:
        raise RootError("apt is configured with no mirror to take packages from")
    print(f"making the root {spec.name} from Debian {spec.suite}", file=sys.stderr, flush=True)
    reasons = []
    for mirror in mirrors:
        preferences = root.with_name("preferences")
        preferences.write_text(
            f"Package: {' '.join(spec.pinned)}\nPin: release n={spec.suite}-backports\nPin-Priority: 900\n"
            if spec.pinned
            else ""
        )
        signed = f" [signed-by={debian.KEYRING}]" if debian.KEYRING.exists() else ""
        suites = [spec.suite, *([f"{spec.suite}-backports"] if spec.pinned else [])]
        command = [
            "mmdebstrap",
            f"--variant={spec.variant}",
            *([f"--architectures={spec.architecture}"] if spec.architecture else []),
            f"--mode={'root' if privileged else 'chrootless'}",
            f"--include={','.join((*spec.packages, *spec.pinned))}",
            '--setup-hook=mkdir -p "$1/etc/apt/preferences.d"',
            f'--setup-hook=cp "{preferences}" "$1/etc/apt/preferences.d/pins"',
            spec.suite,
            str(root),
            "-",
        ]
        lines = "".join(f"deb{signed} {mirror} {suite} main\n" for suite in suites)
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        shutil.rmtree(root, ignore_errors=True)
        reasons.append(_reason(done.stderr))
    raise RootError(f"mmdebstrap could not make the root {spec.name}: {'; '.join(dict.fromkeys(reasons))}")


def _reason(output: str) -> str:
    """The errors in mmdebstrap's output without a host's name."""
    errors = [line.strip() for line in output.splitlines() if line.lstrip().startswith("E:")]
    return re.sub(r"\w+://[^/\s]+", "the mirror", " ".join(errors) or "it gave no reason")
