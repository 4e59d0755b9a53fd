"""The listings of the documents for plugin authors are run: by pytest, by a server, by a client."""

import os
import subprocess
import sys

import pytest

from tests.deadline import SECONDS
from tests.documents import TREE, blocks
from tests.server.programs import environment
from vfu_server.device import ModelCommand
from vfu_server.testing import Client, Guest, ModelProcess

AUTHORS = TREE / "docs" / "plugins"


def test_the_test_that_the_testing_page_shows(tmp_path):
    (shown,) = (block for block in blocks(AUTHORS / "testing.md", "python") if "def test_" in block.body)
    (tmp_path / "test_shown.py").write_text(shown.body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "vfu_server.testing.pytest_plugin", "-p", "no:cacheprovider"]
    env = environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The models of the page on models, as modules."""
    for block in blocks(AUTHORS / "models.md", "python"):
        name = "blinker_model" if "Blinker" in block.body else "scratchpads_model"
        (tmp_path / f"{name}.py").write_text(block.body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def test_the_model_from_a_register_table(models):
    with ModelProcess(ModelCommand("blinker_model", "")) as model, Guest.connect(model.path, timeout=SECONDS) as guest:
        guest.start()
        interrupts = guest.enable_msi(1)
        guest.write(0, 0x08, 8, 0x3000)
        guest.write(0, 0x10, 4, 5)
        interrupts.wait(timeout=SECONDS)
        assert guest.read(0, 0x04, 4) == 1
        assert guest.memory.read(0x3000, 4) == b"\5\0\0\0"
        assert model.registers()["lamp"] == 1


def test_the_model_of_several_functions(models):
    with (
        ModelProcess(ModelCommand("scratchpads_model", "")) as model,
        Client.connect(model.path, timeout=SECONDS) as vf,
        Client.connect(f"{model.path}.pf", timeout=SECONDS) as pf,
    ):
        vf.negotiate()
        pf.negotiate()
        vf.write(0, 0, 8, 0x55)
        assert pf.read(0, 0, 8) == 0x55


def test_any_model_by_its_name(folder):
    """`vfu-model`, as the page on models shows it."""
    for name in ("edu", "generic_dmaq/edu"):
        path = folder / "s"
        command = [sys.executable, "-P", "-m", "vfu_server.model_server", name, "--socket-path", str(path)]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == f"ready {path}\n"
            with Client.connect(str(path), timeout=SECONDS) as client:
                client.negotiate()
                assert client.read(0, 0, 4) == 0x010000ED
            process.terminate()
            assert process.wait(SECONDS) == 0
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "no model is named; models:\n"),
        (("toaster",), 2, "there is no model 'toaster'"),
        (("vfio/edu",), 2, "there is no model 'vfio/edu'"),
        (("--help",), 0, "usage: vfu-model NAME --socket-path PATH"),
        (("edu",), 2, "one of the arguments --socket-path --fd is required"),
    ],
)
def test_names_of_models(arguments, code, said):
    command = [sys.executable, "-P", "-m", "vfu_server.model_server", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
