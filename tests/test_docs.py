"""The documents say what the code does: options, exit codes, errors, tables, examples, snippets, links."""

import argparse
import builtins
import errno
import inspect
import json
import re
import shlex
import tomllib

import pytest

from plugins.hns.models import __main__ as hns_models
from plugins.mlx5.models import __main__ as connectx
from tests.documents import TREE, anchors, blocks, commands, documents, links, messages, prose, table, text
from vfu_server import (
    cli_arguments,
    cli_doctor,
    cli_parser,
    cli_trace,
    companion,
    config_file,
    device,
    dma_memory,
    errors,
    exit_codes,
    hookspecs,
    host_device,
    migration,
    model,
    plugins,
    policy,
    regmap,
    testing,
    uapi,
)
from vfu_server.exit_codes import MEANINGS, ExitCode
from vfu_server.migration import Arc, Step
from vfu_server.model_server import program
from vfu_server.testing import pytest_plugin
from vfu_server.testing.conformance import CHECKS
from vfu_server.tools import migrate as tool_migrate
from vfu_server.tools import plugin as tool_plugin
from vfu_server.tools import stream as tool_stream
from vfu_server.tools.outcome import Outcome

RUNNING = "docs/operators/running.md"
TOOLS = "docs/operators/tools.md"
CONTRACT = "docs/plugins/contract.md"

by_document = pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(TREE)))


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    names = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names = names.union(*(options_of(each) for each in action.choices.values()))
    return names


SERVER_OPTIONS = options_of(cli_parser.build())
MODEL_OPTIONS = options_of(program._parser()) - {"--help"}
CARD_OPTIONS = options_of(connectx.build())
DOCTOR_OPTIONS = options_of(cli_doctor.build()) - {"--help"}
TRACE_OPTIONS = options_of(cli_trace.build()) - {"--help"}
HNS_MODEL_OPTIONS = options_of(hns_models._parser())
TOOL_OPTIONS = options_of(tool_migrate.build()) | options_of(tool_stream.build())
PLUGIN_TOOL = "docs/plugins/vfu-plugin.md"
PLUGIN_OPTIONS = options_of(tool_plugin.build()) - {"--help"}


# --- what operators read


def test_every_option_is_in_the_table_and_the_other_way_round():
    documented = {name for row in table(RUNNING, "option") for name in re.findall(r"`(--[\w-]+)`", row[0])}
    assert documented == SERVER_OPTIONS


def test_every_option_of_the_doctor_is_in_its_table():
    documented = {
        name for row in table("docs/operators/doctor.md", "option") for name in re.findall(r"`(--[\w-]+)`", row[0])
    }
    assert documented == DOCTOR_OPTIONS


def test_every_option_of_a_model_is_in_its_table():
    documented = {
        name for row in table("docs/plugins/models.md", "option") for name in re.findall(r"`(--[\w-]+)`", row[0])
    }
    assert documented == MODEL_OPTIONS


@by_document
def test_options_in_the_text_exist(path):
    named = set(re.findall(r"`(--[a-z][\w-]*)[`= ]", prose(path)))
    models = MODEL_OPTIONS | CARD_OPTIONS | HNS_MODEL_OPTIONS
    known = SERVER_OPTIONS | models | DOCTOR_OPTIONS | TRACE_OPTIONS | TOOL_OPTIONS | PLUGIN_OPTIONS
    assert named - known == set()


def test_every_option_of_the_card_is_in_its_table():
    rows = table("plugins/mlx5/models/README.md", "option")
    assert {name for row in rows for name in re.findall(r"`(--[\w-]+)", row[0])} == CARD_OPTIONS


def test_every_option_of_the_tools_is_in_their_table():
    documented = {name for row in table(TOOLS, "option") for name in re.findall(r"`(--[\w-]+)`", row[0])}
    assert documented == TOOL_OPTIONS


def test_every_option_and_check_of_vfu_plugin_is_documented():
    rows = table(PLUGIN_TOOL, "option")
    assert {name for row in rows for name in re.findall(r"`(--[\w-]+)`", row[0])} == PLUGIN_OPTIONS
    assert [row[0] for row in table(PLUGIN_TOOL, "check")] == [f"`{each.name}`" for each in CHECKS]
    shown = [line for block in blocks(TREE / PLUGIN_TOOL, "console") for line in commands(block)]
    for line in shown:
        assert tool_plugin.build().parse_known_args(shlex.split(line)[1:])[0].word in line


def test_every_fixture_is_documented():
    documented = {row[0].strip("`").partition("(")[0] for row in table("docs/plugins/testing.md", "fixture")}
    assert documented == {name for name in vars(pytest_plugin) if name.startswith("vfu_")}


def test_exit_codes_of_the_tools():
    assert [int(row[0]) for row in table(TOOLS, "code")] == [outcome.value for outcome in Outcome]
    for parser in (tool_migrate.build(), tool_stream.build()):
        assert re.findall(r"^    (\d)  ", parser.format_help(), re.MULTILINE) == [str(each.value) for each in Outcome]


def test_examples_of_the_tools_parse():
    shown = [line for block in blocks(TREE / TOOLS, "console") for line in commands(block)]
    assert len(shown) == 5
    for line in shown:
        name, *words = shlex.split(line)
        {"vfu-migrate": tool_migrate, "vfu-stream": tool_stream}[name].build().parse_args(words)


def test_the_tools_are_installed():
    scripts = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["scripts"]
    for name, module in (("vfu-migrate", tool_migrate), ("vfu-stream", tool_stream)):
        assert scripts[name] == f"{module.__name__}:{module.main.__name__}"


def test_choices_of_options_are_named():
    rows = {re.findall(r"`(--[\w-]+)`", row[0])[0]: row[-1] for row in table(RUNNING, "option")}
    for action in cli_parser.build()._actions:
        if action.choices:
            missing = [str(choice) for choice in action.choices if f"`{choice}`" not in rows[action.option_strings[-1]]]
            assert missing == [], action.option_strings


def test_exit_codes():
    rows = [(int(code), name, meaning) for code, name, meaning in table(RUNNING, "code")]
    assert rows == [(code.value, code.name, MEANINGS[code]) for code in ExitCode]


def test_fields_of_the_configuration_file():
    rows = {
        row[0].split(",")[0].strip("`[]"): set(re.findall(r"`([\w-]+)`", row[1])) for row in table(RUNNING, "table")
    }
    assert rows["server"] == set(config_file._SERVER)
    assert rows["defaults"] == set(config_file._DEFAULTS)
    assert rows["device"] == set(config_file._DEVICE) - set(config_file._DEFAULTS)


def test_the_configuration_file_shown_is_read(tmp_path):
    shown = [block for block in blocks(TREE / RUNNING, "toml") if "[[device]]" in block.body]
    assert len(shown) == 1
    file = tmp_path / "server.toml"
    file.write_text(shown[0].body)
    assert len(config_file.read(str(file)).devices) == 3


def test_every_error_is_explained_with_its_errno():
    documented = {row[0]: row[1] for row in table("docs/operators/migration.md", "error")}
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.VfuServerError)
    }
    assert set(documented) == set(classes) - {"VfuServerError"}
    for name, said in documented.items():
        if said.isupper():
            assert said == errno.errorcode[classes[name].default_errno], name


def test_quoted_messages_exist():
    """A … stands for what differs; every piece between must be a text of the code, all of one row in one text."""
    cells = re.findall(r"^\| (`[^|]+`) \|", text("docs/operators/troubleshooting.md"), re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30
    wrong = [message for message in quoted if not any(says(known, message) for known in messages())]
    assert wrong == []


def says(known: str, quoted: str) -> bool:
    """The pieces of `quoted` that are long enough to mean something stand in `known`, in order."""
    at = 0
    pieces = [piece.strip() for piece in re.split(r"…|: …", quoted)]
    pieces = [piece for piece in pieces if len(piece) > 3]
    for piece in pieces:
        at = known.find(piece, at)
        if at < 0:
            return False
    return bool(pieces)


def section(name: str, heading: str) -> str:
    body = text(name).split(f"## {heading}\n", 1)[1]
    return re.split(r"^## ", body, maxsplit=1, flags=re.MULTILINE)[0]


def test_the_readme_names_the_test_commands_of_ci():
    ci = re.findall(r"^timeout \S+ \w+ (make [a-z-]+)\b", (TREE / ".ci" / "run").read_text(), re.MULTILINE)
    readme = [line for block in blocks(TREE / "README.md", "console") for line in commands(block)]
    assert ci == ["make test", "make test-vm"]
    assert {"make demo", *ci} <= set(readme)


@by_document
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (TREE / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", prose(path))) <= targets


# --- examples


def server_lines() -> list[tuple[str, str]]:
    """(where, arguments) of every `vfu-server` that a document shows as a command."""
    found = []
    for path in documents():
        for block in blocks(path):
            lines = commands(block) if block.language == "console" else block.body.splitlines()
            for line in lines:
                match = re.match(r"(?:ExecStart=/usr/bin/)?vfu-server (--.*)$", line.strip())
                if match and "..." not in line:
                    found.append((block.where, match[1].removesuffix(" &").replace("%i", "0000:3b:00.1")))
    return found


def test_server_examples_parse():
    examples = server_lines() + [("--help", line) for line in help_examples()]
    assert len(examples) > 12
    for where, line in examples:
        arguments = cli_parser.build().parse_args(shlex.split(line))
        if not (arguments.show_policy or arguments.list_plugins or arguments.config):
            assert cli_arguments.server_config(arguments).devices, where


def help_examples() -> list[str]:
    return re.findall(r"^ +vfu-server (.*)$", cli_parser.EXAMPLES, re.MULTILINE)


@by_document
def test_snippets_are_sound(path):
    for block in blocks(path):
        if block.language == "python":
            compile(block.body, block.where, "exec")
        elif block.language == "toml":
            tomllib.loads(block.body)
        for device_option in re.findall(r"-device '(\{.*\})'", block.body):
            assert json.loads(device_option)["driver"] == "vfio-user-pci"


@pytest.mark.parametrize("name", ["policy-and-registers.md", "testing.md", "cookbook.md"])
def test_snippets_of_the_kit_run(name):
    shown = blocks(TREE / "docs" / "plugins" / name, "python")
    assert shown
    for block in shown:
        exec(compile(block.body, block.where, "exec"), {})


@by_document
def test_languages_of_blocks_are_known(path):
    """So that none escapes the tests above by a misspelt name."""
    assert {block.language for block in blocks(path)} <= {"", "python", "toml", "console", "text"}


# --- links and names


@by_document
def test_links_lead_somewhere(path):
    wrong = []
    for target in links(path):
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        if not place.exists() or (anchor and anchor not in anchors(place)):
            wrong.append(target)
    assert wrong == []


def test_every_document_can_be_reached_from_the_readme():
    linked = {(TREE / target.partition("#")[0]).resolve() for target in links(TREE / "README.md")}
    assert [path for path in documents() if path.name != "README.md" and path not in linked] == []


KNOWN_ERRORS = {
    name
    for module in (errors, exit_codes, plugins, model, testing, builtins)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


@by_document
def test_error_classes_exist(path):
    assert set(re.findall(r"\b[A-Z][A-Za-z]+Error\b", path.read_text())) - KNOWN_ERRORS == set()


@by_document
def test_paths_in_the_tree_exist(path):
    named = re.findall(r"`((?:vfu_server|plugins|tests|tools|docs|csrc)/[\w./-]+)`", prose(path))
    roots = (TREE, TREE / "vfu_server" / "libvfio_user")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


# --- the contract


def signature(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def public(kind: type) -> dict[str, object]:
    """Members that the class itself declares, by name."""
    own = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    return own | {name: None for name in inspect.get_annotations(kind) if not name.startswith("_")}


def documented_signatures(body: str) -> dict[str, tuple[bool, list[str] | None]]:
    """name -> (async, arguments or None) of everything in code font that looks like a member."""
    found = {}
    for is_async, name, arguments in re.findall(r"`(async )?(\w+)(?:\(([\w, ]*)\))?`", body):
        listed = None if arguments is None else [a.strip() for a in arguments.split(",") if a.strip()]
        if name not in found or listed:
            found[name] = (bool(is_async), listed or [])
    return found


@pytest.mark.parametrize(
    ("kind", "heading"),
    [
        (device.Device, "Device"),
        (host_device.HostDevice, "HostDevice"),
        (model.Model, "Model"),
        (model.Bus, "Bus"),
        (companion.Companions, "Companions"),
        (dma_memory.DmaMemory, "DmaMemory"),
    ],
)
def test_every_method_is_documented_with_its_arguments(kind, heading):
    body = section(CONTRACT, heading)
    if heading == "Device":  # one heading for each
        body = "\n".join(re.findall(r"^### (.*)$", body, re.MULTILINE))
    documented = documented_signatures(body)
    members = public(kind)
    assert set(members) - set(documented) - {"host", "lock"} == set()
    for name, member in members.items():
        if inspect.isfunction(member):
            is_async = inspect.iscoroutinefunction(member)
            assert documented[name] == (is_async, signature(member)), name


def test_the_contract_names_no_method_that_is_not_there():
    headings = re.findall(r"^### `(?:async )?(\w+)", section(CONTRACT, "Device"), re.MULTILINE)
    assert set(headings) <= set(public(device.Device))


def test_every_hook_is_documented_with_its_arguments():
    headings = dict(re.findall(r"^### `(vfu_server_\w+)\((.*)\)`$", section(CONTRACT, "Hooks"), re.MULTILINE))
    hooks = {name: value for name, value in vars(hookspecs).items() if name.startswith("vfu_server_")}
    assert set(headings) == set(hooks)
    for name, hook in hooks.items():
        assert headings[name] == ", ".join(signature(hook)), name
    assert f"VFU_SERVER_API = {hookspecs.API_VERSION}" in text(CONTRACT)


def test_words_of_policy_and_registers():
    name = "docs/plugins/policy-and-registers.md"
    assert [row[0] for row in table(name, "answer")] == ["PASS", "MMAP", "TRAP", "SHADOW", "DISCARD", "REFUSE"]
    assert {row[0] for row in table(name, "answer")} == {answer.name for answer in policy.Answer}
    classes = {row[0].upper(): set(row[1].split(", ")) for row in table(name, "class")}
    assert classes == {
        each.name: {state.name for state, found in policy.STATE_CLASS.items() if found is each}
        for each in policy.StateClass
    }
    assert {row[0] for row in table(name, "access")} == {access.value for access in regmap.Access}
    assert {row[0] for row in table(name, "save")} == {save.value for save in regmap.Save}


def test_the_testing_kit_is_named_in_full():
    named = set(re.findall(r"`(\w+)`", section_of_table("docs/plugins/testing.md", "name")))
    assert named <= set(testing.__all__)
    for name in ("Client", "Guest", "GuestMemory", "Interrupts", "migrate", "migrate_guest", "EduDriver"):
        assert name in named


def section_of_table(name: str, head: str) -> str:
    return "\n".join(row[0] for row in table(name, head))


# --- the design's tables

DESIGN = "docs/design/migration.md"
STEP_WORDS = {
    Step.SWITCH_CLASS: "switch class",
    Step.STOP_P2P: "stop(P2P)",
    Step.STOP_FULL: "stop(FULL)",
    Step.START_P2P: "start(P2P)",
    Step.START_FULL: "start(FULL)",
    Step.APPLY_SHADOW: "apply kept writes",
    Step.OPEN_SAVE: "open save",
    Step.SAVE_PRE_COPY: "save(PRE_COPY)",
    Step.PAUSE_PRE_COPY: "pause save",
    Step.SAVE_STOP_COPY: "save(STOP_COPY)",
    Step.CLOSE_SAVE: "close save",
    Step.OPEN_LOAD: "open load",
    Step.FINISH_LOAD: "finish load",
}


def test_the_state_table_is_the_codes():
    everything = max(migration.FLAG_SETS)
    names = re.search(r"^\| from \\ to \|(.*)\|$", text(DESIGN), re.MULTILINE)
    assert names is not None
    columns = [uapi.MigState[name.strip()] for name in names[1].split("|")]
    rows = table(DESIGN, "from")
    assert {row[0] for row in rows} == {state.name for state in columns}
    for row in rows:
        source = uapi.MigState[row[0]]
        for target, cell in zip(columns, row[1:], strict=True):
            assert cell == first_step(everything, source, target), (source, target)


def first_step(flags: int, source: uapi.MigState, target: uapi.MigState) -> str:
    try:
        step = migration.next_step(flags, source, target)
    except errors.StateError:
        return "x"
    return "-" if step is source else step.name


def test_the_steps_of_every_arc_are_the_codes():
    documented = {row[0]: row[1].split(", ") for row in table(DESIGN, "arc")}
    arcs = {arc for flags in migration.FLAG_SETS for arc in migration.arcs(flags)}
    assert documented == {str(arc): [STEP_WORDS[step] for step in migration.steps(arc)] for arc in arcs}
    assert all(isinstance(arc, Arc) for arc in arcs)
