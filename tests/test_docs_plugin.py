"""The plugin and the profile that the documents show are real: served as shown, driven as shown, migrated."""

import re
import subprocess
import sys
import tempfile

import pytest

from tests.documents import TREE, blocks
from tests.server.programs import Server, environment, run
from vfu_server.testing import Client, save
from vfu_server.uapi import MigState

AUTHORS = TREE / "docs" / "plugins"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The walk-through's files as an installed package."""
    for block in blocks(AUTHORS / "writing-a-plugin.md", "python"):
        name = re.match(r"# (acme_copy/\w+\.py)\n", block.body)
        assert name is not None, block.where
        file = tmp_path / name[1]
        file.parent.mkdir(exist_ok=True)
        file.write_text(block.body)
    metadata = tmp_path / "acme_copy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-copy\nVersion: 1.0\n")
    (project,) = (b.body for b in blocks(AUTHORS / "writing-a-plugin.md", "toml") if "entry-points" in b.body)
    (point,) = re.findall(r"^(acme_copy) = \"(.*)\"$", project, re.MULTILINE)
    (metadata / "entry_points.txt").write_text(f"[vfu_server]\n{' = '.join(point)}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme_copy"]:
        del sys.modules[name]


@pytest.fixture
def sockets():
    """Two paths for sockets, short ones: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vfu-docs-") as folder:
        yield [f"{folder}/a", f"{folder}/b"]


def test_the_walk_through_is_a_plugin_that_migrates(site, sockets):
    listed = run("--list-plugins", sites=[site])
    assert "acme_copy 1.0 (acme_copy)\n  ACME copy engines\n  --model acme-copy: " in listed.stdout
    shown = run("--plugin", "acme_copy", "--show-policy", sites=[site], COLUMNS="200")
    assert "doorbell" in shown.stdout
    assert "P2P: not offered: a peer's write to the doorbell would start DMA" in " ".join(shown.stdout.split())
    started = [
        Server("--plugin", "acme_copy", "--model", "acme-copy", "--socket-path", path, sites=[site]) for path in sockets
    ]
    with started[0], started[1]:
        for server in started:
            server.wait_log("listening at")
        from acme_copy.test_copy import check

        check(*sockets)
        refuse_a_cut_stream(*sockets)
        for server in started:
            assert server.end()[0] == 0, server.log
    assert "saved" in started[0].log
    assert "StreamFormatError" not in started[0].log


def refuse_a_cut_stream(source_socket: str, destination_socket: str) -> None:
    """What docs/plugins/testing.md shows, with a real stream."""
    kit: dict[str, object] = {}
    shown = blocks(AUTHORS / "testing.md", "python")[0]
    exec(compile(shown.body, shown.where, "exec"), kit)
    with Client.connect(source_socket) as source, Client.connect(destination_socket) as destination:
        source.negotiate()
        destination.negotiate()
        source.set_mig_state(MigState.STOP_COPY)
        stream = b"".join(save(source))
        source.set_mig_state(MigState.RUNNING)
        kit["refuses_a_cut_stream"](source, destination, stream)


def test_the_profile_migrates_the_same_engine(site, sockets):
    profile = site / "acme-copy.toml"
    (shown,) = (b.body for b in blocks(AUTHORS / "profiles.md", "toml") if "[profile]" in b.body)
    profile.write_text(shown)
    models = [
        subprocess.Popen(
            [sys.executable, "-m", "acme_copy.model", "--socket-path", f"{path}m"],
            env=environment(site),
            stdout=subprocess.PIPE,
        )
        for path in sockets
    ]
    try:
        for model in models:
            assert model.stdout is not None
            assert model.stdout.readline().startswith(b"ready ")
        started = [
            Server(
                *("--plugin", "generic_dmaq", "--option", f"profile={profile}"),
                *("--device-socket", f"{path}m", "--socket-path", path),
            )
            for path in sockets
        ]
        with started[0], started[1]:
            for server in started:
                server.wait_log("listening at")
            from acme_copy.test_copy import check

            check(*sockets)
            for server in started:
                assert server.end()[0] == 0, server.log
    finally:
        for model in models:
            model.terminate()
            model.communicate(timeout=5)
