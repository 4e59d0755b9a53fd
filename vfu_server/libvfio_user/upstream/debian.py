"""Owns fetching Debian's source package of QEMU from the mirror that this machine's apt is configured with.

Changes nothing of the system: apt runs with a configuration, lists and state of its own inside the folder that is being
filled, needs no root, and goes through the proxy and keys that the machine's apt uses. Mirror names stay out of every
message. Must not know which revision of libvfio-user is wanted.
"""

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SUITES = ("trixie-backports", "forky", "sid")
SUBTREE = "/subprojects/libvfio-user/"
OLDEST = (11, 1)
PINNED_POOL = "pool/main/q/qemu/qemu_11.1.1+ds.orig.tar.xz"
PINNED_SHA256 = "0b1376e75dbe3e2fea4e408f8669f88a723f419f36a5b7d74cc6a4cfe07e4f5e"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_HELPER = "/usr/lib/apt/apt-helper"
APT_TIMEOUT = 600
SCRATCH = ".download"


class Offer(NamedTuple):
    """A tarball on disk that matched its digest, and its name for messages."""

    name: str
    tarball: Path


class Listed(NamedTuple):
    """A tarball as an index describes it: path below the mirror, sha256."""

    pool: str
    sha256: str


def offers(folder: Path, tried: list[str]) -> Iterator[Offer]:
    """Tarballs that may hold the library: what the indices list, then the pinned file.

    Each is downloaded into `folder` when asked for. What cannot be had is added to `tried`, without a host's name.
    """
    mirrors = mirror_uris()
    if not mirrors:
        tried.append("apt is not there, or is configured with no mirror")
    scratch = folder / SCRATCH
    for mirror in mirrors:
        seen: set[Listed] = set()
        scratch.mkdir(exist_ok=True)
        pinned = Listed(PINNED_POOL, PINNED_SHA256)
        for listed in _listings(mirror, scratch, tried, pinned):
            name = listed.pool.rpartition("/")[2]
            if listed in seen:
                continue
            seen.add(listed)
            where = "pinned pool file" if listed is pinned else "listed by apt's index"
            tarball = scratch / name
            print(f"libvfio-user: fetching {name} ({where})", flush=True)
            if error := _download(f"{mirror.rstrip('/')}/{listed.pool}", tarball, listed.sha256):
                tried.append(f"{name} ({where}): {error}")
                continue
            yield Offer(f"{name} ({where})", tarball)


def pinned_offer(folder: Path, tried: list[str]) -> Offer | None:
    """The pinned tarball alone, for who needs that very version; downloaded into `folder`. None, and why in `tried`."""
    name = PINNED_POOL.rpartition("/")[2]
    mirrors = mirror_uris()
    if not mirrors:
        tried.append("apt is not there, or is configured with no mirror")
    for mirror in mirrors:
        print(f"qemu: fetching {name}", flush=True)
        error = _download(f"{mirror.rstrip('/')}/{PINNED_POOL}", folder / name, PINNED_SHA256)
        if not error:
            return Offer(name, folder / name)
        tried.append(f"{name}: {error}")
    return None


def unpack(offer: Offer, folder: Path) -> None:
    """Put the library's subtree of the tarball into `folder`, and nothing else; the tarball is removed."""
    found = False
    with _open_tar(offer.tarball) as tar:
        for member in tar:
            inside = member.name.partition(SUBTREE)[2]
            if not inside or not member.isfile():
                continue
            target = folder.joinpath(inside).resolve()
            content = tar.extractfile(member)
            if content is None or not target.is_relative_to(folder.resolve()):
                raise OSError(f"odd member {member.name!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                shutil.copyfileobj(content, out)
            found = True
    if not found:
        raise OSError(f"has no {SUBTREE.strip('/')}")
    shutil.rmtree(folder / SCRATCH)


def clear(folder: Path) -> None:
    """Empty `folder` but for the downloads, for the next offer."""
    for path in folder.iterdir():
        if path.name != SCRATCH:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def mirror_uris() -> list[str]:
    """Base URIs of the archives apt is configured with, in its order, security archives last; empty without apt."""
    if not shutil.which("apt-get"):
        return []
    asked = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)"], dict(os.environ))
    uris = asked.stdout.split() if asked.returncode == 0 else []
    uris += _configured_uris()
    plain = dict.fromkeys(uri.rstrip("/") for uri in uris if re.match(r"(https?|file|ftp):/", uri))
    return sorted(plain, key=lambda uri: "security" in uri)


def _configured_uris() -> list[str]:
    """The URIs in apt's source files: apt tells none of them before its first update."""
    dump = _run(
        ["apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"], dict(os.environ)
    )
    paths = dict(re.findall(r"^(LIST|PARTS)='(.*)'$", dump.stdout, re.MULTILINE))
    parts = Path(paths.get("PARTS", "/etc/apt/sources.list.d"))
    files = [
        Path(paths.get("LIST", "/etc/apt/sources.list")),
        *sorted(parts.glob("*.list")),
        *sorted(parts.glob("*.sources")),
    ]
    uris: list[str] = []
    for file in files:
        text = file.read_text(errors="replace") if file.is_file() and os.access(file, os.R_OK) else ""
        if file.suffix == ".sources":
            uris += _deb822_uris(text)
        else:
            uris += re.findall(r"^\s*deb(?:-src)?\s+(?:\[[^\]]*\]\s*)?(\S+)", text, re.MULTILINE)
    return uris


def _deb822_uris(text: str) -> list[str]:
    """`URIs:` of every enabled stanza; comment lines may stand between a field and its continuation."""
    uris: list[str] = []
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", lines):
        if re.search(r"^Enabled:\s*(no|false|off|0|without|disable)\s*$", stanza, re.MULTILINE | re.IGNORECASE):
            continue
        for value in re.findall(r"^URIs:((?:.*)(?:\n[ \t].*)*)", stanza, re.MULTILINE | re.IGNORECASE):
            uris += value.split()
    return uris


def _listings(mirror: str, scratch: Path, tried: list[str], pinned: Listed) -> Iterator[Listed]:
    """Suite by suite, each index fetched only when what came before was of no use; the pinned file last."""
    for suite in SUITES:
        yield from _index(mirror, suite, scratch, tried)
    yield pinned


def _index(mirror: str, suite: str, scratch: Path, tried: list[str]) -> list[Listed]:
    """What the signed source index of one suite lists of QEMU from 11.1 on, newest first."""
    found: dict[Listed, tuple[int, ...]] = {}
    home = scratch / suite
    environment = _private_apt(mirror, suite, home)
    update = _run(["apt-get", "-q", "update"], environment)
    if update.returncode or re.search(r"^(E:|W: Failed)", update.stderr, re.MULTILINE):
        tried.append(f"the source index of {suite}: {_reason(update.stdout + update.stderr)}")
    listing = _run(["apt-cache", "showsrc", "--only-source", "qemu"], environment)
    for stanza in listing.stdout.split("\n\n"):
        found.update(tarballs(stanza))
    shutil.rmtree(home)
    return sorted(found, key=lambda listed: found[listed], reverse=True)


def tarballs(stanza: str) -> Iterator[tuple[Listed, tuple[int, ...]]]:
    """The orig tarball of one stanza of a Sources index, when its version is new enough."""
    directory = re.search(r"^Directory: (\S+)$", stanza, re.MULTILINE)
    version = re.search(r"^Version: (?:\d+:)?(\d+(?:\.\d+)*)", stanza, re.MULTILINE)
    sums = re.search(r"^Checksums-Sha256:((?:\n .*)+)", stanza, re.MULTILINE)
    if not (directory and version and sums):
        return
    numbers = tuple(int(number) for number in version[1].split("."))
    for sha256, name in re.findall(r"^ ([0-9a-f]{64}) \d+ (qemu_\S+\.orig\.tar\.\w+)$", sums[1], re.MULTILINE):
        if numbers >= OLDEST:
            yield Listed(f"{directory[1]}/{name}", sha256), numbers


def _private_apt(mirror: str, suite: str, home: Path) -> dict[str, str]:
    """An apt of our own below `home` that knows one deb-src line; the machine's transport settings stay in force."""
    (home / "lists" / "partial").mkdir(parents=True)
    (home / "parts").mkdir()
    signed = f" [signed-by={KEYRING}]" if KEYRING.exists() else ""
    (home / "sources.list").write_text(f"deb-src{signed} {mirror} {suite} main\n")
    (home / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{home}/sources.list";\nDir::Etc::sourceparts "{home}/parts";\n'
        f'Dir::State "{home}";\nDir::State::lists "{home}/lists";\nDir::Cache "{home}";\n'
        'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\nAcquire::Languages "none";\n'
        # No hook of the machine may run, and as root apt must not drop to a user who cannot enter the cache.
        'APT::Sandbox::User "root";\n#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n'
        "#clear APT::Update::Post-Invoke-Success;\n#clear DPkg::Post-Invoke;\n"
    )
    return {**os.environ, "APT_CONFIG": str(home / "apt.conf")}


def _download(uri: str, target: Path, sha256: str) -> str | None:
    """Fetch with apt's own transport, digest checked by it; None, or why not."""
    target.unlink(missing_ok=True)
    command = [APT_HELPER, "-o", "APT::Sandbox::User=root", "download-file", uri, str(target), f"SHA256:{sha256}"]
    done = _run(command, dict(os.environ))
    return None if done.returncode == 0 and target.is_file() else _reason(done.stdout + done.stderr)


def _reason(output: str) -> str:
    """The last error line of apt without host and address."""
    lines = [line.strip() for line in output.splitlines() if re.match(r"\s*(E:|W:|Err:|\d{3} )", line)]
    last = lines[-1] if lines else (output.strip().splitlines() or ["apt gave no reason"])[-1]
    text = re.sub(r"\w+://[^/\s]+", "the mirror", last)
    return re.sub(r"\[IP:[^\]]*\]|'[^'\s]+\.[^'\s]+'", "", text).strip()


def _open_tar(path: Path) -> tarfile.TarFile:
    """Open a tarball; a Python that was built without lzma gets it through the xz program."""
    try:
        return tarfile.open(path, "r:*")
    except tarfile.CompressionError:
        plain = path.with_suffix("")
        with plain.open("wb") as out:
            subprocess.run(["xz", "-dc", str(path)], stdout=out, check=True)
        return tarfile.open(plain, "r:")


def _run(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run quietly in the C locale; a missing program or a time-out reads like a failure."""
    environment = {**environment, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=APT_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", f"E: {type(error).__name__}: {command[0]}")
