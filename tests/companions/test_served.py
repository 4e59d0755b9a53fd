"""Whole servers whose plugin needs a PF beside its VF: found, shared, failing, left."""

import os
import signal
import socket

import pytest

from tests.companions.functions import DOORBELL
from tests.deadline import SECONDS
from tests.model_process import ModelProcess
from tests.server.programs import Server, run
from vfu_server.testing import Client, ReplyError, save
from vfu_server.uapi import MigState

MODULE = "tests.companions.functions"
OPENED, CLOSED = "opened as a companion", "closed: nobody uses it any more"


def client_of(path) -> Client:
    client = Client.connect(str(path), timeout=SECONDS)
    client.negotiate()
    return client


def saved(client: Client) -> bytes:
    """The device's stream; it goes on afterwards."""
    client.set_mig_state(MigState.STOP_COPY)
    stream = b"".join(save(client))
    client.set_mig_state(MigState.RUNNING)
    return stream


def config(folder, **devices: str):
    """A configuration file of devices behind sockets: name -> lines of its table."""
    file = folder / "server.toml"
    tables = "".join(f'[[device]]\nname = "{name}"\n{lines}\n' for name, lines in devices.items())
    file.write_text(f'[defaults]\nplugin = "acme_vf"\nsocket-path = "{folder}/%n.sock"\n{tables}')
    return file


def test_a_models_vf_finds_its_pf_beside_it(folder, site):
    path = folder / "vf.sock"
    with Server("--plugin", "acme_vf", "--model", "acme-vf", "--socket-path", path, sites=[site]) as server:
        server.wait_log("listening at", SECONDS)
        with client_of(path) as client:
            stream = saved(client)
        assert (2).to_bytes(4, "little") * 64 in stream  # STOP and SAVE were the PF's first commands
        assert server.end(seconds=SECONDS)[0] == 0, server.log
    assert server.log.count(OPENED) == server.log.count(CLOSED) == 1
    assert "Traceback" not in server.log


def test_two_devices_share_one_driver(folder, site):
    with ModelProcess(folder, module=MODULE) as model:
        file = config(
            folder,
            one=f'device-socket = "{model.path}"',
            two=f'device-socket = "{model.path}.vf2"\noptions = {{ pf = "{model.path}.pf" }}',
        )
        with Server("--config", file, sites=[site]) as server:
            for name in ("one", "two"):
                server.wait_log(f"listening at {folder}/{name}.sock", SECONDS)
            with client_of(folder / "one.sock") as one, client_of(folder / "two.sock") as two:
                for count in (2, 5):  # STOP, SAVE, START of each device
                    client = one if count == 2 else two
                    assert count.to_bytes(4, "little") * 64 in saved(client)
            assert server.end(seconds=SECONDS)[0] == 0, server.log
        assert server.log.count(OPENED) == server.log.count(CLOSED) == 1
        with client_of(f"{model.path}.pf") as pf:  # the model's socket is free again
            assert pf.read(0, DOORBELL, 4) == 6


def test_a_lost_companion_harms_its_users_only_when_they_need_it(folder, site):
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    with ModelProcess(folder / "a", module=MODULE) as vfs, ModelProcess(folder / "b", "pf", module=MODULE) as pf:
        options = ("--plugin", "acme_vf", "--device-socket", vfs.path, "--option", f"pf={pf.path}")
        with Server(*options, "--socket-path", folder / "s", sites=[site]) as server:
            server.wait_log("listening at", SECONDS)
            with client_of(folder / "s") as client:
                client.write(0, 0, 4, 0x1234)
                assert (2).to_bytes(4, "little") * 64 in saved(client)
                os.kill(pf.process.pid, signal.SIGKILL)
                server.wait_log("the companion has failed: the function is gone", SECONDS)
                with pytest.raises(ReplyError):
                    client.set_mig_state(MigState.STOP)
                assert client.mig_state() is MigState.RUNNING
                assert client.read(0, 0, 4) == 0x1234
            assert server.end(seconds=SECONDS)[0] == 0, server.log
    assert server.log.count("the companion has failed") == 1
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "pf=/nowhere/pf.sock",
            "companion /nowhere/pf.sock: cannot connect to the device's server at /nowhere/pf.sock",
        ),
        ("pf=../x", "cannot connect to the device's server at"),
        ("pf=0000:ff:1f.7", "companion 0000:ff:1f.7: there is no PCI function 0000:ff:1f.7"),
        ("pf=what is it", "companion 'what is it': it is no PCI address, path of a socket or word"),
        ("pf=other", "cannot connect to the device's server at"),
    ],
)
@pytest.mark.parametrize("plugin", ["acme_vf", "acme_vf_first"])
def test_a_companion_that_is_not_there_is_one_clear_line(folder, site, plugin, option, said):
    done = run(
        "--plugin", plugin, "--model", "acme-vf", "--option", option, "--socket-path", folder / "s", sites=[site]
    )
    first, *notes = [line for line in done.stderr.splitlines() if " warning " not in line]  # of a model that is slow
    assert (done.returncode, said in first) == (4, True), done.stderr
    assert first.startswith("vfu-server: error: companion ")
    assert all(note.startswith("  ") for note in notes)


def test_a_companion_that_nobody_answers_for(folder, site):
    """It accepts and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "pf"))
        listener.listen()
        listener.close()
        done = run(
            *("--plugin", "acme_vf", "--model", "acme-vf", "--option", f"pf={folder}/pf"),
            *("--socket-path", folder / "s"),
            sites=[site],
        )
    assert (done.returncode, "Connection refused" in done.stderr) == (4, True), done.stderr


def test_what_a_plugin_asks_for_beforehand_is_opened_first_and_closed_last(folder, site):
    (folder / "a").mkdir()
    with ModelProcess(folder / "a", module=MODULE) as model:
        done = run(
            *("--plugin", "acme_vf_first", "--device-socket", folder / "no-vf"),
            *("--option", f"pf={folder}/no-pf", "--socket-path", folder / "s"),
            sites=[site],
        )
        assert f"companion {folder}/no-pf" in done.stderr
        options = ("--plugin", "acme_vf_first", "--device-socket", model.path, "--socket-path", folder / "s")
        with Server(*options, sites=[site]) as server:
            server.wait_log("listening at", SECONDS)
            with client_of(folder / "s") as client:
                assert (2).to_bytes(4, "little") * 64 in saved(client)
            assert server.end(seconds=SECONDS)[0] == 0, server.log
    log = server.log
    assert log.index(OPENED) < log.index("listening at") < log.index("statistics at the end") < log.index(CLOSED)


def test_a_hook_that_names_no_list(folder, site):
    file = site / "acme_vf_first.py"
    file.write_text(file.read_text().replace('[options.get("pf", "pf")]', '"pf"'))
    done = run("--plugin", "acme_vf_first", "--model", "acme-vf", "--socket-path", folder / "s", sites=[site])
    assert done.returncode == 3
    assert "vfu_server_companions returned 'pf', no list of addresses" in done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("HostError('the PF says no')", 4, "vfu-server: error: the PF says no\n"),
        ("ValueError('a bug')", 70, "plugin 'acme_vf' failed in open: ValueError: a bug"),
    ],
)
def test_open_that_raises(folder, site, raised, code, said):
    file = site / "acme_vf" / "device.py"
    shown = file.read_text()
    body = "self._pf = await self._stack.enter_async_context(companions.open(self._where, serve_pf))"
    assert body in shown
    file.write_text(
        shown.replace(body, f"from vfu_server.errors import HostError\n        raise {raised}").replace(
            '"""Leave it."""', 'print("closed", flush=True)'
        )
    )
    done = run("--plugin", "acme_vf", "--model", "acme-vf", "--socket-path", folder / "s", sites=[site])
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert ("Traceback" in done.stderr) == (code == 70)
    assert done.stdout == "closed\n"
