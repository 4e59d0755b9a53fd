"""`vfu-plugin`: what it writes works, what it lists, checks and traces is true, and mistakes are one line."""

import json
import os
import signal
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET

import pytest

from tests.deadline import SECONDS
from tests.kit.conftest import NAME
from tests.server.programs import TREE, environment
from vfu_server.testing import Client
from vfu_server.testing.conformance import CHECKS
from vfu_server.tools import plugin, plugin_new
from vfu_server.uapi import MigState


def tool(*arguments, sites=(), cwd=None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "vfu_server.tools.plugin", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(*sites, COLUMNS="200"), cwd=cwd, capture_output=True, text=True, timeout=SECONDS
    )


def test_what_is_written_passes_its_own_tests(written):
    """With the fixtures of the kit, and no other plugin of pytest's."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "vfu_server.testing.pytest_plugin", "-W", "error"]
    env = environment(written, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], env=env, cwd=written, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed" in done.stdout


def test_the_fixtures_are_an_entry_point():
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"vfu_server": "vfu_server.testing.pytest_plugin"}
    assert project["scripts"]["vfu-plugin"] == "vfu_server.tools.plugin:main"


def test_what_is_written_is_a_project_that_setuptools_knows(written):
    project = tomllib.loads((written / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["vfu_server"] == {NAME: NAME}
    assert project["tool"]["setuptools"]["packages"] == [NAME]
    left = [path for path in written.rglob("*") if path.is_file() and "@" in path.read_text().replace("@hookimpl", "")]
    left = [path for path in left if any(word in path.read_text() for word in ("@NAME@", "@DIST@", "@CLASS@", "@API@"))]
    assert left == []


@pytest.mark.parametrize("kind", ["mypy", "ruff"])
def test_what_is_written_is_typed_and_tidy(written, kind):
    commands = {
        "mypy": ["-m", "mypy", "--strict", "--no-incremental", "--follow-imports", "silent", NAME],
        "ruff": ["-m", "ruff", "check", "--no-cache", "--select", "E,F,W,B,UP,SIM", "--line-length", "120", "."],
    }
    done = subprocess.run(
        [sys.executable, *commands[kind]],
        cwd=written,
        env=os.environ | {"MYPYPATH": str(TREE)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["", "Acme", "1st", "a-b", "import", "vfu_server", "a" * 40, "../x"])
def test_names_that_cannot_be(tmp_path, name):
    done = tool("new", name, tmp_path / "x")
    assert (done.returncode, "is no name for a plugin" in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over_what_is_there(tmp_path):
    (tmp_path / "mine").write_text("work of years")
    done = tool("new", "acme", tmp_path)
    assert (done.returncode, "is not empty" in done.stderr) == (2, True)
    (tmp_path / "closed").write_text("a file")
    done = tool("new", "acme", tmp_path / "closed")
    assert (done.returncode, "cannot be written" in done.stderr) == (3, True), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["closed", "mine"]


def test_new_says_what_it_wrote_and_what_comes_next(tmp_path):
    done = tool("new", "acme_x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "next: cd acme_x && pip install -e .[test] && pytest && vfu-plugin check acme_x"
    assert [line for line in lines[:-2] if not (tmp_path / line).is_file()] == []
    assert len(lines[:-2]) == len(list(plugin_new.TEMPLATE.rglob("*.tmpl"))) == 8


def test_list(written, tmp_path):
    site = tmp_path / "site"
    (site / "bad-1.dist-info").mkdir(parents=True)
    (site / "bad-1.dist-info" / "entry_points.txt").write_text("[vfu_server]\nbad = no_such_module\n")
    done = tool("list", sites=[written, site])
    assert done.returncode == 0
    assert f"{NAME} 0.1 ({NAME})\n  {NAME} devices\n  --model written-sum: sums bytes" in done.stdout
    assert "broken: plugin 'bad' (bad unknown) cannot be imported" in done.stdout
    rows = json.loads(tool("list", "--format", "json", sites=[written]).stdout)
    assert {row["name"] for row in rows} >= {NAME, "generic_dmaq", "vfio"}


def test_check_reports_to_people_and_machines(written, tmp_path):
    report = tmp_path / "report.xml"
    only = [word for name in ("policy", "states", "pre-copy") for word in ("--only", name)]
    done = tool("check", NAME, *only, "--junit", report, sites=[written])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 checks: 2 passed, 1 not judged" in done.stdout
    suite = ET.parse(report).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "0", "1")
    assert [case.get("name") for case in suite] == ["policy", "states", "pre-copy"]
    assert suite[2][0].get("message") == "pre-copy is not offered"


def test_check_ends_with_1_if_one_fails(written, tmp_path):
    package = tmp_path / "site"
    package.mkdir()
    (package / "half.py").write_text(
        f"from {NAME} import *\nfrom {NAME}.device import WrittenSumDevice\n"
        "from vfu_server.hookspecs import hookimpl\nfrom vfu_server.errors import HostError\n"
        "VFU_SERVER_API = 1\nclass Half(WrittenSumDevice):\n"
        "    async def stop(self, kind):\n        raise HostError('no \\x1b[31m & <no>')\n"
        "@hookimpl\ndef vfu_server_probe(host, options):\n    return Half(host)\n"
        "@hookimpl\ndef vfu_server_describe(options):\n    return {}\n"
    )
    (package / "half-1.dist-info").mkdir()
    (package / "half-1.dist-info" / "entry_points.txt").write_text("[vfu_server]\nhalf = half\n")
    report = tmp_path / "report.xml"
    done = tool("check", "half", "--only", "states", "--junit", report, sites=[written, package])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 checks: 1 failed" in done.stdout
    assert "\x1b[31m" not in done.stdout
    (failure,) = ET.parse(report).getroot().iter("failure")
    assert "& <no>" in (failure.text or "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("check", "nobody"), 1, "there is no plugin 'nobody'"),
        (("check", "generic_dmaq", "--only", "all"), 2, "--only all: there is no such check"),
        (("check", "generic_dmaq", "--model", "toaster"), 2, "plugin 'generic_dmaq' has no such model"),
        (("check", "vfio"), 2, "plugin 'vfio' ships no model: give two devices"),
        (("check", "vfio", "--device-socket", "/a"), 2, "two are needed, a source and a destination, not 1"),
        (("check", "vfio", "--device-socket", "/a", "--model", "b"), 2, "exclude each other"),
        (("check", "generic_dmaq", "--surprise"), 2, "unrecognized arguments: --surprise"),
        (("trace", "--plugin", "nobody", "--model", "x", "--socket-path", "/tmp/x"), 1, "there is no plugin 'nobody'"),
        (("trace", "--output", "/nowhere/x", "--plugin", "a", "--model", "b"), 3, "'/nowhere/x' cannot be written"),
        ((), 2, "required: WHAT"),
    ],
)
def test_mistakes_are_one_line(arguments, code, said):
    done = tool(*arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_sockets_that_nobody_serves():
    done = tool("check", "vfio", "--device-socket", "/nowhere/a", "--device-socket", "/nowhere/b", "--only", "policy")
    assert done.returncode == 1
    assert "cannot connect to the device's server at /nowhere/a" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_checks_are_listed():
    done = tool("check", "x", "--list-checks")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [each.name for each in CHECKS]


@pytest.mark.parametrize("form", ["text", "json"])
def test_trace_tells_hooks_and_calls_in_order(written, folder, form):
    out = folder / "trace"
    path = folder / "s"
    command = [sys.executable, "-P", "-m", "vfu_server.tools.plugin", "trace", "--output", str(out)]
    command += ["--trace-format", form, "--plugin", NAME, "--model", "written-sum", "--socket-path", str(path)]
    env = environment(written)
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if "listening at" in line:
                    break
            with Client.connect(str(path), timeout=SECONDS) as client:
                client.negotiate()
                client.set_mig_state(MigState.STOP_COPY)
                while client.mig_data_read(1 << 16):
                    pass
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    lines = out.read_text().splitlines()
    if form == "json":
        events = [json.loads(line) for line in lines]
        calls = [event["call"].partition("(")[0] for event in events]
        assert all(event["took"] >= 0 and event["begun"] >= 0 for event in events)
        (probe,) = [
            event for event in events if event["call"].startswith("vfu_server_probe(host=written-sum, options={}")
        ]
        assert probe["outcome"] == "-> [<WrittenSumDevice>]"
        sent = [event for event in events if event["call"].startswith("save(phase=<SavePhase.STOP_COPY")]
        assert sent[0]["outcome"] == "-> None"
    else:
        calls = [line.split()[4].partition("(")[0] for line in lines]
    awaited = [
        "vfu_server_models",
        "vfu_server_probe",
        "open",
        "stop",
        "save_begin",
        "save",
        "save_end",
        "reset",
        "aclose",
    ]
    at = -1
    for name in awaited:
        assert name in calls[at + 1 :], (name, calls)
        at = calls.index(name, at + 1)


def test_every_option_has_a_help_text():
    parser = plugin.build()
    words = next(action for action in parser._actions if action.choices)
    for each in words.choices.values():
        assert all(action.help for action in each._actions)
