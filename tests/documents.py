"""What the project's documents show, taken apart for tests: code blocks, tables, links, headings.

It must not know what is right; the tests do.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "plugins", "examples")


def documents() -> list[Path]:
    """Every document: the README's, docs/, and those beside plugins and examples."""
    return [TREE / "README.md", *(path for name in FOLDERS for path in sorted((TREE / name).rglob("*.md")))]


def text(name: str) -> str:
    """One document by its path in the tree."""
    return (TREE / name).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its lines, and where it begins."""

    language: str
    body: str
    where: str


def blocks(path: Path, language: str = "") -> list[Block]:
    """The fenced blocks of a document, of one language or of all. Blocks inside lists are set back."""
    found = []
    lines = path.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        fence = re.fullmatch(r"( *)```(\w*)", lines[at])
        if fence is None:
            at += 1
            continue
        end = lines.index(f"{fence[1]}```", at + 1)
        body = "\n".join(line.removeprefix(fence[1]) for line in lines[at + 1 : end]) + "\n"
        found.append(Block(fence[2], body, f"{path.relative_to(TREE)}:{at + 1}"))
        at = end + 1
    return [block for block in found if language in ("", block.language)]


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(block: Block) -> list[str]:
    """The command lines of a console block, without prompt, continued ones joined."""
    joined = re.sub(r"\\\n\s*", "", block.body)
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def table(name: str, head: str) -> list[list[str]]:
    """The rows of the one table of a document whose header row begins with `head`, cells stripped."""
    lines = text(name).splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(f"| {head}")]
    assert len(starts) == 1, f"{name} has {len(starts)} tables that begin with {head!r}"
    rows = []
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def anchors(path: Path) -> set[str]:
    """What a link may name behind `#`: the headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def links(path: Path) -> list[str]:
    """The targets of all links that do not lead out of the tree."""
    return [target for target in re.findall(r"\]\(([^)]+)\)", prose(path)) if "://" not in target]


@cache
def messages() -> tuple[str, ...]:
    """All texts in the server's and the plugins' code; what is filled in at run time stands as NUL."""
    found: list[str] = []
    for folder in ("vfu_server", "plugins", "examples"):
        for path in (TREE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found.extend(_texts(node))
        for path in (TREE / folder).rglob("*.c"):
            source = re.sub(r'"\s*\n?\s*"', "", path.read_text(encoding="utf-8"))
            found.extend(re.findall(r'"((?:[^"\\\n]|\\.)*)"', source))
    return tuple(found)


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "\0"
            for part in node.values
        )
