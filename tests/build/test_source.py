"""libvfio-user's source: the right revision is found, another is refused by name, a failure lists all attempts."""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from vfu_server.libvfio_user import build
from vfu_server.libvfio_user.upstream import cache, debian, locate, revision
from vfu_server.libvfio_user.upstream.revision import SourceError


@pytest.fixture(scope="module")
def real() -> revision.Source:
    """The source that the extension under test was built from."""
    return locate.locate()


@pytest.fixture
def source(real: revision.Source, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(real.path, tmp_path / "libvfio-user"))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt is configured with a mirror in a folder, which serves no index; the cache is empty; no folder is given."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "here.sources").write_text(f"Types: deb\nURIs: file:{folder}\nSuites: trixie\nComponents: main\n")
    config = tmp_path / "apt.conf"
    config.write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/none";\nDir::Etc::sourceparts "{parts}";\nDir::State::lists "{tmp_path}";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(config))
    monkeypatch.setenv("VFU_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(locate.VARIABLE, raising=False)
    return folder


def serve_pinned(mirror: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a source package with `source` inside below the mirror and pin its digest."""
    target = mirror / debian.PINNED_POOL
    target.parent.mkdir(parents=True)
    with tarfile.open(target, "w:xz") as tar:
        tar.add(source, arcname="qemu-11.1.1+ds/subprojects/libvfio-user")
        for name in ("qemu-11.1.1+ds/README", "qemu-11.1.1+ds/subprojects/other/README"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"hello"))
    monkeypatch.setattr(debian, "PINNED_SHA256", hashlib.sha256(target.read_bytes()).hexdigest())


def test_right_revision_is_known_by_name(real: revision.Source) -> None:
    assert real.name == revision.REVISION == "4d9f663"


def test_every_file_that_is_compiled_or_included_counts(real: revision.Source) -> None:
    directories = build.include_dirs(real, build.json_c())
    command = [
        "gcc",
        "-MM",
        *build.COMMON_FLAGS,
        *(f"-I{folder}" for folder in directories),
        *build.library_sources(real),
    ]
    rules = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {Path(word).relative_to(real.path).as_posix() for word in rules.split() if word.startswith(f"{real.path}/")}
    assert len(used) > 25
    assert used <= revision.wanted().keys()


def test_changed_file_is_refused_by_name_and_can_be_accepted_knowingly(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (source / "lib" / "dma.h").open("a") as header:
        header.write("/* changed */\n")
    with pytest.raises(SourceError) as refused:
        revision.check(source)
    digest = revision.digest_of(revision.listing(source))
    for fact in ("wanted is 4d9f663", "differs in lib/dma.h.", digest[:12], f"{revision.ACCEPT}={digest}"):
        assert fact in str(refused.value)
    monkeypatch.setenv(revision.ACCEPT, digest)
    assert revision.check(source).digest == digest


def test_additional_header_is_another_revision(source: Path) -> None:
    (source / "include" / "new.h").touch()
    with pytest.raises(SourceError, match=r"differs in include/new\.h\."):
        revision.check(source)


def test_old_migration_protocol_is_never_accepted(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = source / "include" / "libvfio-user.h"
    header.write_text(header.read_text().replace("VFU_MIGR_CALLBACKS_VERS 2", "VFU_MIGR_CALLBACKS_VERS 1"))
    monkeypatch.setenv(revision.ACCEPT, revision.digest_of(revision.listing(source)))
    with pytest.raises(SourceError, match="VFU_MIGR_CALLBACKS_VERS 1, wanted is 2"):
        revision.check(source)


def test_folder_of_the_user_is_taken_or_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(locate.VARIABLE, str(source))
    assert locate.locate().path == source
    monkeypatch.setenv(locate.VARIABLE, str(tmp_path))
    with pytest.raises(SourceError, match=f"LIBVFIO_USER_SRC: {tmp_path} is not libvfio-user's source"):
        locate.locate()


def test_pinned_file_of_the_mirror_fills_the_cache(mirror: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_pinned(mirror, source, monkeypatch)
    found = locate.locate()
    assert found.name == revision.REVISION
    assert found.path.is_relative_to(cache.cache_root())
    assert {path.name for path in found.path.iterdir()} == {*os.listdir(source), cache.DONE}
    shutil.rmtree(mirror)
    assert locate.locate() == found


def test_damaged_cache_is_made_anew(mirror: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_pinned(mirror, source, monkeypatch)
    found = locate.locate()
    (found.path / "lib" / "irq.c").write_text("")
    assert locate.locate() == found
    assert (found.path / "lib" / "irq.c").read_bytes() == (source / "lib" / "irq.c").read_bytes()


def test_wrong_bytes_from_the_mirror_are_not_used(mirror: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_pinned(mirror, source, monkeypatch)
    with (mirror / debian.PINNED_POOL).open("ab") as tarball:
        tarball.write(b"x")
    with pytest.raises(SourceError, match=r"qemu_11\.1\.1\+ds\.orig\.tar\.xz \(pinned pool file\)"):
        locate.locate()
    assert list(cache.cache_root().rglob(cache.DONE)) == []


def test_failure_lists_everything_that_was_tried(mirror: Path) -> None:
    with pytest.raises(SourceError) as failed:
        locate.locate()
    message = str(failed.value)
    for step in (
        "LIBVFIO_USER_SRC is not set",
        "not in the cache: ",
        "the source index of trixie-backports: ",
        "the source index of forky: ",
        "the source index of sid: ",
        "qemu_11.1.1+ds.orig.tar.xz (pinned pool file): ",
        "Set LIBVFIO_USER_SRC to a folder with revision 4d9f663",
    ):
        assert step in message


def test_machine_without_apt(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="apt is not there, or is configured with no mirror"):
        locate.locate()


def test_mirrors_of_all_forms_of_source_files(tmp_path: Path, mirror: Path) -> None:
    parts = tmp_path / "parts"
    (parts / "a.list").write_text(
        "# deb http://comment.example/debian x main\n"
        "deb http://one.example/debian trixie main\n"
        "deb [arch=amd64 signed-by=/k] https://security.example/debian-security trixie main\n"
        "deb cdrom:[disc]/ trixie main\n"
    )
    (parts / "b.sources").write_text(
        "Types: deb\n# a comment\nURIs: http://two.example/debian/\n  http://three.example/debian\nSuites: trixie\n\n"
        "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: trixie\n"
    )
    assert debian.mirror_uris() == [
        "http://one.example/debian",
        "http://two.example/debian",
        "http://three.example/debian",
        f"file:{mirror}",
        "https://security.example/debian-security",
    ]


def test_index_entry_is_read() -> None:
    digest = "5" * 64
    stanza = (
        "Package: qemu\nVersion: 1:11.1.2+ds-1\nChecksums-Sha256:\n"
        f" {'6' * 64} 100 qemu_11.1.2+ds-1.dsc\n {digest} 200 qemu_11.1.2+ds.orig.tar.xz\n"
        "Directory: pool/main/q/qemu\n"
    )
    listed = debian.Listed("pool/main/q/qemu/qemu_11.1.2+ds.orig.tar.xz", digest)
    assert list(debian.tarballs(stanza)) == [(listed, (11, 1, 2))]
    assert list(debian.tarballs(stanza.replace("1:11.1.2", "1:10.0.2"))) == []


def test_member_outside_the_folder_is_refused(tmp_path: Path) -> None:
    tarball = tmp_path / "bad.tar"
    with tarfile.open(tarball, "w") as tar:
        member = tarfile.TarInfo("qemu/subprojects/libvfio-user/../../../../escape")
        tar.addfile(member, io.BytesIO())
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    with pytest.raises(OSError, match="odd member"):
        debian.unpack(debian.Offer("bad", tarball), target)
    assert not (tmp_path / "escape").exists()
