"""What `make qemu` compiles, without compiling it: the series, its key in the cache, what it says when it cannot."""

import re
import shutil
from pathlib import Path

import pytest

from tools import qemu_build
from tools.debian_root import RootError
from vfu_server.libvfio_user.upstream import debian


def test_the_series_is_whole_and_in_order() -> None:
    names = [path.name for path in qemu_build.patches()]
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    cover = (qemu_build.PATCHES / "0000-cover-letter.patch").read_text(encoding="utf-8")
    assert f"[PATCH 00/{len(names)}]" in cover
    assert "***" not in cover
    for path in qemu_build.patches():
        text = path.read_text(encoding="utf-8")
        assert re.search(rf"^Subject: \[PATCH {path.name[1:4].lstrip('0').zfill(2)}/{len(names)}\]", text, re.MULTILINE)
        assert "\nSigned-off-by: " in text


def test_nothing_is_compiled_by_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFU_CACHE", str(tmp_path))
    monkeypatch.delenv("VFU_QEMU", raising=False)
    assert qemu_build.found_qemu() is None
    assert list(tmp_path.iterdir()) == []


def test_another_series_is_another_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = qemu_build._key()
    assert before.startswith(f"{qemu_build.VERSION}-")
    shutil.copytree(qemu_build.PATCHES, tmp_path / "qemu")
    monkeypatch.setattr(qemu_build, "PATCHES", tmp_path / "qemu")
    assert qemu_build._key() == before
    with qemu_build.patches()[0].open("a", encoding="utf-8") as patch:
        patch.write("\n")
    assert qemu_build._key() != before


def test_what_is_missing_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFU_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RootError, match=r"gcc, ninja.*tools/system-packages qemu"):
        qemu_build.built_qemu()
    assert not [path for path in (tmp_path / "qemu").iterdir() if path.is_dir()]


def test_no_source_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFU_CACHE", str(tmp_path))
    monkeypatch.setattr(qemu_build, "_check_programs", lambda: None)
    monkeypatch.setattr(debian, "mirror_uris", list)
    with pytest.raises(RootError, match="apt is not there, or is configured with no mirror"):
        qemu_build.built_qemu()
