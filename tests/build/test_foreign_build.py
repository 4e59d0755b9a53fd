"""What somebody else's make sees of ours: nothing, however deep in a make we are ourselves."""

import subprocess

from tools.foreign_build import foreign_environment

MAKEFILE = "all:\n\t@echo level=$(MAKELEVEL) flags=$(MAKEFLAGS) of=$(OF)\n"


def test_a_make_below_ours_takes_itself_for_the_first(monkeypatch):
    monkeypatch.setenv("MAKELEVEL", "2")
    monkeypatch.setenv("MAKEFLAGS", "--no-print-directory")
    command = ["make", "-s", "-f", "-"]
    said = [
        subprocess.run(command, input=MAKEFILE, capture_output=True, text=True, check=True, env=environment).stdout
        for environment in (None, foreign_environment(OF="them"))
    ]
    assert said[0].startswith("level=2")
    assert said[1] == "level=0 flags=s of=them\n"


def test_it_does_not_run_our_python(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("HOME", "/somebody")
    found = foreign_environment()
    assert "PYTHONPATH" not in found
    assert found["HOME"] == "/somebody"
