"""What the operators' documents say of traces and policies is what the program does."""

import argparse
import re
import shlex

import pytest

from tests.documents import TREE, blocks, commands, table
from tests.test_docs import options_of
from vfu_server import cli_print, cli_trace
from vfu_server.plugins import Plugins
from vfu_server.plugins_installed import find_all
from vfu_server.region import MmapMode
from vfu_server.trace_format import HEAD, MAX_HEADER, RECORD, VERSION, Kind, TraceHeader

TRACING = "docs/operators/tracing.md"
FORMAT = "docs/design/trace-format.md"
POLICIES = TREE / "docs" / "plugins" / "policies"


def test_options_of_the_tool():
    rows = table(TRACING, "option")
    documented = {name for row in rows for name in re.findall(r"`(--[\w-]+)`", row[0])}
    assert documented == options_of(cli_trace.build())
    actions = {word for row in rows for word in re.findall(r"^`(\w+)`", row[0])}
    (subparsers,) = (each for each in cli_trace.build()._actions if isinstance(each, argparse._SubParsersAction))
    assert actions == set(subparsers.choices)


def test_examples_of_the_tool_parse():
    lines = [line for block in blocks(TREE / TRACING, "console") for line in commands(block)]
    lines += re.findall(r"^ +(vfu-trace .*)$", cli_trace.EPILOG, re.MULTILINE)
    examples = [line for line in lines if line.startswith("vfu-trace ")]
    assert len(examples) >= 4
    for line in examples:
        assert cli_trace.build().parse_args(shlex.split(line)[1:]).file


def test_exit_codes_of_the_tool():
    codes = {int(row[0]) for row in table(TRACING, "code of vfu-trace")}
    said = re.search(r"exit codes: (.*)", cli_trace.EPILOG, re.DOTALL)
    assert said is not None
    assert codes == {int(number) for number in re.findall(r"\b(\d)\b", said[1])}


def test_the_file_is_as_described():
    rows = table(FORMAT, "bytes")
    assert [row[1] for row in rows] == ["magic", "version", "record size", "header size", "JSON"]
    assert sum(int(row[0]) for row in rows[:-1]) == HEAD.size
    assert (rows[1][2], rows[2][2]) == (str(VERSION), str(RECORD.size))
    assert f"{MAX_HEADER >> 10} KiB" in rows[3][2]
    keys = [name for row in table(FORMAT, "key") for name in re.findall(r"`(\w+)`", row[0])]
    assert set(keys) == set(TraceHeader.__dataclass_fields__)
    assert {row[0]: int(row[1]) for row in table(FORMAT, "kind")} == {kind.name: kind.value for kind in Kind}


def test_the_record_is_as_described():
    sizes = {"Q": 8, "I": 4, "H": 2, "B": 1}
    at, expected = 0, []
    for letter in RECORD.format.strip("<").removesuffix("2x"):
        expected.append((at, sizes[letter]))
        at += sizes[letter]
    rows = [(int(row[0]), int(row[1]), row[2]) for row in table(FORMAT, "offset")]
    assert [(offset, size) for offset, size, _ in rows] == [*expected, (at, 2)]
    names = ["time", "offset", "value", "width", "took", "errno", "region", "kind", "answer", "class", "reserved"]
    assert [name for *_, name in rows] == names


# --- policies


@pytest.mark.parametrize("name", sorted({entry.name for entry in find_all()}))
def test_the_policy_of_each_plugin_is_up_to_date(name):
    plugins = Plugins()
    page = cli_print.policy_page(name, plugins.describe(plugins.load(name), {}), MmapMode.PLUGIN)
    cure = f"vfu-server --plugin {name} --show-policy --format markdown > docs/plugins/policies/{name}.md"
    path = POLICIES / f"{name}.md"
    assert path.is_file(), cure
    assert path.read_text() == page, cure


def test_no_policy_is_left_of_a_plugin_that_has_gone():
    assert {path.stem for path in POLICIES.glob("*.md")} == {entry.name for entry in find_all()}
