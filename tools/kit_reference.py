"""Writes docs/plugins/reference.md from the kit itself: every public name that a plugin may import, as its source says.

    python -m tools.kit_reference            prints the page
    python -m tools.kit_reference --write    puts it in its place

It reads the sources and imports nothing, so a broken module cannot keep it from the others.
"""

import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
PAGE = TREE / "docs" / "plugins" / "reference.md"
MODULES = (
    "hookspecs",
    "device",
    "host_device",
    "companion",
    "dma_memory",
    "pci_command",
    "policy",
    "regmap",
    "errors",
    "kernel_migration",
    "model",
    "model_registers",
    "pciconfig",
    "toml_lines",
)
QUOTE = "'"
HEAD = """# Reference of the kit

Made from the kit's sources by `python -m tools.kit_reference --write`; a test fails when it is not current. What is
called when, and what holds afterwards, is in [the contract](contract.md). Numbers and layouts of the kernel's interface
are in `vfu_server/uapi.py` by the kernel's names; a model's program is `vfu_server.model_server.main` or
`main_functions`.
"""


def page() -> str:
    """The whole page."""
    return "\n\n".join([HEAD.rstrip(), *(_module(name) for name in MODULES)]) + "\n"


def _module(name: str) -> str:
    tree = ast.parse((TREE / "vfu_server" / f"{name}.py").read_text(encoding="utf-8"))
    parts = [f"## vfu_server.{name}", _doc(tree)]
    for node, text in _documented(tree.body):
        if isinstance(node, ast.ClassDef):
            parts.append(_class(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts += [f"### `{_signature(node)}`", _doc(node)]
        elif names := _names(node):
            parts.append(f"- `{names}`" + (f": {_flat(text)}" if text else ""))
    return "\n\n".join(part for part in parts if part)


def _class(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases if ast.unparse(base) not in ("ABC", "Protocol"))
    parts = [f"### class `{node.name}`" + (f" ({bases})" if bases else ""), _doc(node)]
    rows = [_made(node, member) for member in node.body if getattr(member, "name", "") == "__init__"]
    for member, text in _documented(node.body):
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
            kinds = {ast.unparse(each) for each in member.decorator_list}
            shown = member.name if kinds & {"property"} else _signature(member)
            said = _doc(member)
            rows.append(f"- `{shown}`" + (f": {_flat(said)}" if said else ""))
        elif names := _names(member):
            rows.append(f"- `{names}`" + (f": {_flat(text)}" if text else ""))
    return "\n\n".join([*(part for part in parts if part), *(["\n".join(rows)] if rows else [])])


def _made(node: ast.ClassDef, member: ast.stmt) -> str:
    """How one is made, where the class says so itself."""
    if not isinstance(member, ast.FunctionDef):
        return ""
    said = _doc(member)
    return f"- `{_signature(member).replace('__init__', node.name).removesuffix(' -> None')}`" + (
        f": {_flat(said)}" if said else ""
    )


def _documented(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """Public statements, each with the string that stands behind it."""
    for at, node in enumerate(body):
        name = getattr(node, "name", None) or _names(node)
        if not name or name.startswith("_"):
            continue
        following = body[at + 1] if at + 1 < len(body) else None
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = str(following.value.value)
        yield node, text


def _names(node: ast.stmt) -> str:
    """`NAME = value` of an assignment of a plain name; a long value is left out."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        shown = f"{node.target.id}: {ast.unparse(node.annotation)}"
        value = node.value
    elif isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
        shown, value = ast.unparse(node.targets[0]), node.value
    else:
        return ""
    told = "" if value is None else ast.unparse(value)
    return f"{shown} = {told}" if told and len(told) <= 40 and "field(" not in told else shown


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("cls, ")
    if arguments in ("self", "cls"):
        arguments = ""
    waits = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    gives = f" -> {ast.unparse(node.returns).strip(QUOTE)}" if node.returns is not None else ""
    return f"{waits}{node.name}({arguments}){gives}"


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def _flat(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
