"""`vfu-plugin new`: writes an installable plugin that works as it stands, from the template beside this file."""

import keyword
import re
from pathlib import Path

from vfu_server.errors import UsageError
from vfu_server.hookspecs import API_VERSION
from vfu_server.tools.outcome import place_error

TEMPLATE = Path(__file__).parent / "plugin_template"
_SUFFIX = ".tmpl"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
RESERVED = frozenset({"auto", "test", "tests", "vfu_server", "plugins", "vfio", "generic_dmaq"})


def new(name: str, folder: Path) -> list[Path]:
    """Write the package `name` into `folder`, which must not be there or be empty; the files, in order.

    Raises UsageError, PlaceError.
    """
    if _NAME.fullmatch(name) is None or keyword.iskeyword(name) or name in RESERVED:
        raise UsageError(f"{name!r} is no name for a plugin: a Python package of your own, small letters, digits and _")
    words = {
        "@NAME@": name,
        "@DIST@": name.replace("_", "-"),
        "@CLASS@": "".join(part.capitalize() for part in name.split("_")),
        "@API@": str(API_VERSION),
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{str(folder)!r} is not empty: nothing is written over what is there")
        for source in sorted(TEMPLATE.rglob(f"*{_SUFFIX}")):
            path = folder / _place(source.relative_to(TEMPLATE), name)
            text = source.read_text(encoding="utf-8")
            for word, value in words.items():
                text = text.replace(word, value)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise place_error("written", str(folder), error) from error
    return written


def _place(template: Path, name: str) -> Path:
    """`package/x.py.tmpl` -> `NAME/x.py`; tests go into a folder that the template has not, as wheels have no tests."""
    parts = [name if part == "package" else part for part in template.parts]
    if template.name.startswith("test_"):
        return Path("tests", f"test_{name}.py")
    return Path(*parts[:-1], parts[-1].removesuffix(_SUFFIX))
