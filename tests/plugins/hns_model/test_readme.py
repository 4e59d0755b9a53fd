"""The models' README names every option, fault and violation that there is, and no other."""

import re
from pathlib import Path

from plugins.hns.models import __main__ as program
from tests.documents import TREE
from tests.test_docs import options_of

FOLDER = TREE / "plugins/hns/models"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(FOLDER).glob("*.py")))


def rows(heading: str) -> list[list[str]]:
    """The cells of the table rows below a heading, up to the next."""
    part = README.partition(heading)[2].partition("\n## ")[0] if heading else README
    return [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]


def test_faults() -> None:
    named = {name for row in rows("## Faults to order") for name in re.findall(r"`([a-z-]+)`", row[1])}
    assert named == set(re.findall(r'take\("([a-z-]+)"', SOURCE))


def test_violations() -> None:
    named = set()
    for row in rows("## Strictness"):
        first = ""
        for name in re.findall(r"`([a-z_]+)`", row[0]):
            first = first or name.partition("_")[0]
            named.add(first + name if name.startswith("_") else name)
    used = set(re.findall(r'(?:violated|_refuse)\("([a-z_]+)"', SOURCE))
    assert named == used | set(re.findall(r'return "(doorbell_[a-z]+)"', SOURCE))


def test_options() -> None:
    named = {name for row in rows("# Models") for name in re.findall(r"`(--[a-z-]+)`", row[0])}
    assert named == {name for name in options_of(program._parser()) if name != "--help"} - {"--doorbell-isolation"}
