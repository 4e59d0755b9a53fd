"""Finding and loading plugins: the broken ones are told, none keeps the others from working."""

import importlib.metadata
import json
import re
import sys

import pytest

from tests.server.programs import PROBE, install, run
from vfu_server import hookspecs, plugins_installed
from vfu_server.errors import PluginError, UsageError
from vfu_server.plugins import AUTO, BrokenPlugin, Plugin, Plugins

GOOD = (
    PROBE
    + """
from vfu_server.device import ModelCommand

@hookimpl
def vfu_server_models():
    return {"toy": ModelCommand("toy_model", "a toy")}

@hookimpl
def vfu_server_describe(options):
    return {"summary": "a good one", "policies": {}}
"""
)

BROKEN = {
    "imports_nothing_there": (
        "import no_such_module_anywhere\n",
        r"cannot be imported: ModuleNotFoundError: No module named 'no_such\w+' \(.*imports_nothing_there\.py:1\)",
    ),
    "no_python": ("def (:\n", r"cannot be imported: SyntaxError: .*no_python\.py, line 1"),
    "exits": ("import sys\nsys.exit('goodbye')\n", r"cannot be imported: SystemExit: goodbye \(.*exits\.py:2\)"),
    "no_version": ("", r"does not say which version .*: it needs VFU_SERVER_API = 1 at its top level$"),
    "too_new": ("VFU_SERVER_API = 2\n", r"written for version 2 of the plugin contract, this server has 1: update vfu"),
    "too_old": ("VFU_SERVER_API = 0\n", r"written for version 0 of the plugin contract, .*: update the plugin$"),
    "odd_version": ("VFU_SERVER_API = 'one'\n", r"written for version 'one' .*: update the plugin$"),
    "no_probe": ("VFU_SERVER_API = 1\n", r"does not implement vfu_server_probe$"),
    "misspelt": (
        PROBE + "@hookimpl\ndef vfu_server_modells():\n    return {}\n",
        r"implements vfu_server_modells, which is no hook of this server$",
    ),
    "other_arguments": (
        PROBE.replace("host, options", "host, wishes"),
        r"does not fit the plugin contract: PluginValidationError: .*wishes",
    ),
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    before = set(sys.modules)
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_directories_tell_what_importlib_metadata_tells(site) -> None:
    install(site, "good_plugin", {"good": GOOD})
    install(site, "Two.Words", {}, version="2.5", plugins={"with-dash": "a.b:c.d", "extra": "e:f"})
    theirs = {
        (point.name, point.value, plugins_installed._normalized(point.dist.name), point.dist.version)
        for point in importlib.metadata.entry_points(group=hookspecs.PROJECT)
    }
    ours = {(e.name, e.target, e.distribution, e.version) for e in plugins_installed._in_directories()}
    assert ours == theirs
    assert ("with-dash", "a.b:c.d", "two_words", "2.5") in ours


def test_first_distribution_on_the_path_counts(site, tmp_path, monkeypatch) -> None:
    install(site, "good_plugin", {"good": GOOD}, version="1")
    install(tmp_path / "shadow", "good_plugin", {"good": GOOD}, version="2")
    monkeypatch.syspath_prepend(tmp_path / "shadow")
    assert Plugins().load("good").version == "2"


def test_module_and_attribute(site) -> None:
    source = "class Holder:\n    class inner:\n" + "".join(f"        {line}\n" for line in PROBE.splitlines())
    source = source.replace("def vfu_server_probe(host", "def vfu_server_probe(self, host")
    install(site, "nested", {"nested_module": source + "instance = Holder.inner()\n"}, plugins={})
    (site / "nested-1.0.dist-info" / "entry_points.txt").write_text("[vfu_server]\nnested = nested_module:instance\n")
    plugin = Plugins().load("nested")
    assert type(plugin.module).__name__ == "inner"


def test_broken_plugins_do_not_hide_the_good_ones(site) -> None:
    for name, (source, _) in BROKEN.items():
        install(site, f"dist_{name}", {name: source})
    install(site, "good_plugin", {"good": GOOD})
    found = {plugin.name: plugin for plugin in Plugins().load_all()}
    assert isinstance(found["good"], Plugin)
    for name, (_, reason) in BROKEN.items():
        broken = found[name]
        assert isinstance(broken, BrokenPlugin), name
        assert broken.reason.startswith(f"plugin {name!r} (dist_{name} 1.0) ")
        assert re.search(reason, broken.reason), broken.reason


def test_broken_plugin_leaves_no_hook_behind(site) -> None:
    install(site, "good_plugin", {"good": GOOD})
    for name in ("misspelt", "other_arguments"):
        install(site, f"dist_{name}", {name: BROKEN[name][0]})
    plugins = Plugins()
    for name in ("misspelt", "other_arguments"):
        with pytest.raises(PluginError):
            plugins.load(name)
    plugins.load("good")
    assert [name for name, _ in plugins._pluggy.list_name_plugin()] == ["good"]


def test_unknown_plugin(site) -> None:
    install(site, "good_plugin", {"good": GOOD})
    with pytest.raises(PluginError, match=r"there is no plugin 'bad'; installed: .*\bgood\b"):
        Plugins().load("bad")


def test_two_plugins_of_one_name(site) -> None:
    install(site, "one", {"mod_one": GOOD}, plugins={"good": "mod_one"})
    install(site, "two", {"mod_two": GOOD}, plugins={"good": "mod_two"})
    with pytest.raises(PluginError, match=r"two plugins are called 'good', from one 1\.0 and two 1\.0: uninstall one"):
        Plugins().load("good")


def test_auto_warns_of_the_broken(site, caplog) -> None:
    install(site, "good_plugin", {"good": GOOD})
    install(site, "old_plugin", {"too_old": BROKEN["too_old"][0]})
    names = [plugin.name for plugin in Plugins().select(AUTO)]
    assert "good" in names
    assert "too_old" not in names
    assert "plugin 'too_old' (old_plugin 1.0) was written for version 0" in caplog.text


def test_models(site) -> None:
    install(site, "good_plugin", {"good": GOOD})
    plugins = Plugins()
    assert plugins.model("good", "toy").module == "toy_model"
    with pytest.raises(UsageError, match=r"plugin 'good' has no such model; it has: toy"):
        plugins.model("good", "train")
    install(site, "twin_plugin", {"twin": GOOD})
    with pytest.raises(UsageError, match=r"--model toy: plugins 'good' and 'twin' both have one: choose with --plugin"):
        Plugins().model(AUTO, "toy")


def test_plugin_that_crashes_is_named_with_its_traceback(site) -> None:
    install(site, "crash", {"crash": GOOD.replace('return {"toy"', 'return 1 / 0 and {"toy"')})
    done = run("--plugin", "crash", "--model", "toy", "--socket-path", site / "a.sock", sites=[site])
    assert done.returncode == 70
    assert "plugin 'crash' failed in vfu_server_models: ZeroDivisionError: division by zero" in done.stderr
    assert "Traceback" in done.stderr
    assert "crash.py" in done.stderr


def test_list_plugins(site) -> None:
    install(site, "good_plugin", {"good": GOOD})
    install(site, "bad_plugin", {"exits": BROKEN["exits"][0]})
    install(site, "crash", {"crash": GOOD.replace('return {"summary"', 'return 1 / 0 and {"summary"')})
    done = run("--list-plugins", sites=[site])
    assert done.returncode == 0, done.stderr
    assert "good 1.0 (good_plugin)\n  a good one\n  --model toy: a toy\n" in done.stdout
    assert (
        "exits 1.0 (bad_plugin)\n  broken: plugin 'exits' (bad_plugin 1.0) cannot be imported: SystemExit"
        in done.stdout
    )
    assert "crash 1.0 (crash)\n  broken: plugin 'crash' failed in vfu_server_describe: ZeroDivision" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr

    rows = {row["name"]: row for row in json.loads(run("--list-plugins", "--format", "json", sites=[site]).stdout)}
    assert rows["good"]["models"] == {"toy": "a toy"}
    assert "SystemExit" in rows["exits"]["error"]


def test_version_names_every_plugin(site) -> None:
    install(site, "good_plugin", {"good": GOOD}, version="7.1")
    install(site, "bad_plugin", {"exits": BROKEN["exits"][0]})
    done = run("--version", sites=[site])
    assert done.returncode == 0
    assert done.stdout.startswith("vfu-server ")
    assert "\n  plugin good 7.1\n" in done.stdout
    assert "\n  plugin exits 1.0, broken: see --list-plugins\n" in done.stdout


def test_trace(site) -> None:
    install(site, "good_plugin", {"good": GOOD})
    install(site, "bad_plugin", {"exits": BROKEN["exits"][0]})
    quiet = run("--list-plugins", "--log-level", "error", sites=[site])
    assert quiet.stderr == ""
    traced = run("--list-plugins", "--log-level", "error", sites=[site], VFU_SERVER_TRACE_PLUGINS="1")
    assert traced.stdout == quiet.stdout
    assert "vfu_server_models() asked of: good" in traced.stderr
    assert "vfu_server_describe returned [{'summary': 'a good one'" in traced.stderr
    assert "SystemExit: goodbye" in traced.stderr
    assert "Traceback" in traced.stderr
    assert run("--list-plugins", sites=[site], VFU_SERVER_TRACE_PLUGINS="0").stderr == ""


def test_capabilities_load_no_plugin(site) -> None:
    install(site, "loud", {"loud": "raise SystemExit('loaded')\n"})
    done = run("--print-capabilities", "--no-such-option", "--fd", "x", sites=[site])
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["type"] == "vfio-user"
    assert said["version"] == importlib.import_module("vfu_server").__version__
    assert {"socket-path", "fd"} <= set(said["features"])
    assert "loud" in said["plugins"]


@pytest.mark.parametrize(
    ("hook", "body", "said"),
    [
        ("vfu_server_models()", "return ['toy']", "vfu_server_models returned ['toy'], no names with ModelCommands"),
        ("vfu_server_models()", "return {'toy': 'toy'}", "no names with ModelCommands"),
        ("vfu_server_describe(options)", "return 'a toy'", "vfu_server_describe returned str, which is no description"),
        ("vfu_server_describe(options)", "return {'policies': 7}", "which is no description: TypeError"),
        (
            "vfu_server_describe(options)",
            "raise ValueError('a bug')",
            "failed in vfu_server_describe: ValueError: a bug",
        ),
    ],
)
def test_answers_of_the_wrong_kind_stop_no_listing(tmp_path, hook, body, said):
    """Nor the versions of the others."""
    install(tmp_path / "site", "odd", {"odd": PROBE + f"@hookimpl\ndef {hook}:\n    {body}\n"})
    done = run("--list-plugins", sites=[tmp_path / "site"])
    assert (done.returncode, said in done.stdout) == (0, True), done.stdout + done.stderr
    assert "generic_dmaq" in done.stdout
    done = run("--version", sites=[tmp_path / "site"])
    assert "plugin odd 1.0" in done.stdout
    assert done.returncode == 0
