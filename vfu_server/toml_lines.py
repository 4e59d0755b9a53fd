"""Where in the text of a TOML file a key stands: tomllib gives values without lines, and error messages need lines.

A small scanner over text that tomllib has accepted. It must not judge the text, and knows no file of anybody's.
"""

import re
from collections.abc import Iterator

Path = tuple[str | int, ...]
"""Where a value is: keys, and indexes in arrays of tables, as `("bar", 0, "register", 3, "width")`."""

_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*(\[\[|\[)\s*({_DOTTED})\s*\]")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=")
_PART = re.compile(_KEY)
# what may hide brackets or keys in a line: strings of all four kinds, a comment; and the brackets themselves
_TOKEN = re.compile(r'''"""|\'\'\'|"(?:[^"\\]|\\.)*"|'[^']*'|#.*|[\[\]{}]''')


def line_numbers(text: str) -> dict[Path, int]:
    """The line (from 1) of each table header and each key of `text`; keys of inline tables are not told apart."""
    found: dict[Path, int] = {(): 1}
    counts: dict[Path, int] = {}
    table: Path = ()
    for number, line in _statements(text):
        header = _HEADER.match(line)
        if header is not None:
            table = _enter(_parts(header[2]), header[1] == "[[", counts)
            for length in range(1, len(table) + 1):
                found.setdefault(table[:length], number)
            continue
        assignment = _ASSIGNMENT.match(line)
        if assignment is not None:
            path = table
            for part in _parts(assignment[1]):
                path = (*path, part)
                found.setdefault(path, number)
    return found


def line_of(lines: dict[Path, int], path: Path) -> int:
    """The line of `path`, or of the nearest thing around it that has one."""
    while path not in lines:
        path = path[:-1]
    return lines[path]


def _enter(parts: list[str], repeated: bool, counts: dict[Path, int]) -> Path:
    """The path that a header opens: each array of tables on the way is entered at its last element."""
    path: Path = ()
    for part in parts[:-1]:
        path = (*path, part)
        if path in counts:
            path = (*path, counts[path])
    path = (*path, parts[-1])
    if not repeated:
        return path
    counts[path] = counts.get(path, -1) + 1
    return (*path, counts[path])


def _parts(dotted: str) -> list[str]:
    return [part[1:-1] if part[0] in "\"'" else part for part in _PART.findall(dotted)]


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """The lines that begin a statement, with their numbers: not those within a long string or an open bracket."""
    depth, quote = 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        if not depth and not quote:
            yield number, line
            header = _HEADER.match(line)
            if header is not None:
                continue
        depth, quote = _follow(line, depth, quote)


def _follow(line: str, depth: int, quote: str) -> tuple[int, str]:
    """Bracket depth and open long quote behind `line`."""
    at = 0
    while True:
        if quote:
            end = line.find(quote, at)
            if end < 0:
                return depth, quote
            at, quote = end + 3, ""
        token = _TOKEN.search(line, at)
        if token is None:
            return depth, quote
        at = token.end()
        if token[0] in ('"""', "'''"):
            quote = token[0]
        elif token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
