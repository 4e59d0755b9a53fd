"""What `vfu-plugin check` found, for people (rich) and for machines (JUnit XML)."""

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vfu_server.logs import plain
from vfu_server.testing.conformance import Result, Verdict
from vfu_server.tools.outcome import place_error

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {
    Verdict.PASSED: "green",
    Verdict.WARNED: "yellow",
    Verdict.FAILED: "bold red",
    Verdict.NOT_JUDGED: "dim",
}


def show(console: "Console", result: Result) -> None:
    """One result, as soon as it is there."""
    from rich.text import Text

    line = Text.assemble(
        (f"{result.verdict.value:<11}", COLOURS[result.verdict]),
        f"{result.check.name:<14}",
        (f"{result.check.title}", ""),
        (f"  {result.seconds:.1f} s", "dim"),
    )
    console.print(line, soft_wrap=True)
    if result.text:
        for line_of_text in result.text.rstrip("\n").splitlines():
            style = COLOURS[result.verdict] if result.verdict is Verdict.FAILED else "dim"
            console.print(Text(f"           {plain(line_of_text)}", style=style), soft_wrap=True)


def summary(results: Sequence[Result]) -> str:
    """`17 checks: 15 passed, 1 failed, 1 not judged`."""
    counts = Counter(result.verdict for result in results)
    told = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    return f"{len(results)} checks: {told or 'none'}"


def write_junit(path: str, plugin: str, version: str, results: Sequence[Result]) -> None:
    """A JUnit XML file: a suite for each target, a case for each check. Raises PlaceError."""
    root = ET.Element("testsuites", name=f"vfu-plugin check {plugin}")
    for target in dict.fromkeys(result.target for result in results):
        mine = [result for result in results if result.target == target]
        counts = Counter(result.verdict for result in mine)
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"{plugin} {version}: {target}",
            tests=str(len(mine)),
            failures=str(counts[Verdict.FAILED]),
            errors="0",
            skipped=str(counts[Verdict.NOT_JUDGED]),
            time=f"{sum(result.seconds for result in mine):.3f}",
        )
        for result in mine:
            _case(suite, plugin, result)
    ET.indent(root)
    try:
        Path(path).write_bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))
    except OSError as error:
        raise place_error("written", path, error) from error


def _case(suite: ET.Element, plugin: str, result: Result) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        classname=f"{plugin}.{result.target}",
        name=result.check.name,
        time=f"{result.seconds:.3f}",
    )
    text = _xml(result.text)
    if result.verdict is Verdict.FAILED:
        ET.SubElement(case, "failure", message=_xml(result.check.title)).text = text
    elif result.verdict is Verdict.NOT_JUDGED:
        ET.SubElement(case, "skipped", message=text)
    else:
        ET.SubElement(case, "system-out").text = f"{result.verdict.value}: {text}"


def _xml(text: str) -> str:
    """Without what XML cannot hold."""
    return "".join(char if char in "\n\t" or char.isprintable() else "?" for char in text)
