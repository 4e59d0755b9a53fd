"""Imports go one way: a module imports from its own row and the rows below it, and every module has a row."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
PACKAGE = "vfu_server"

# High to low. A name stands for the module and all below it, and the longest match counts. A new module is added here.
ROWS: tuple[tuple[str, ...], ...] = (
    (
        *("cli", "demo", "tools", "__main__", "model_server.__main__"),
        *("testing.serving", "testing.conformance", "testing.pytest_plugin"),
    ),
    (
        *("server", "plugins", "config", "notify", "sockets", "logs", "metrics", "trace", "capabilities"),
        *("exit_codes", "doctor"),
    ),
    ("session", "model_server", "testing"),
    ("migration", "feature", "dma", "irq", "region"),
    ("libvfio_user", "host"),
    (
        *("hookspecs", "device", "host_device", "policy", "regmap", "registers", "stream", "crc32c", "model"),
        *("pciconfig", "trace_format", "kernel_migration", "companion", "dma_memory", "pci_command", "toml_lines"),
    ),
    ("uapi", "errors"),
)
ROW_OF = {entry: number for number, row in enumerate(ROWS) for entry in row}
KIT = ROW_OF["device"]
PLUGINS_MAY_IMPORT = {*ROWS[KIT], *ROWS[KIT + 1], "host.protocol"}
# A guest's driver for load on a plugin's models: run by hand and by tests, imported by nothing of the server's.
GUESTS = ("traffic.py",)
# The build runs on a bare interpreter, before the server and what it depends on are installed.
BUILD = ("libvfio_user.build", "libvfio_user.upstream")


def row_of(module: str) -> int | None:
    """Row of a module named without the package, or None. `session_save` goes with `session`."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in ROW_OF:
            return ROW_OF[name]
    family = [entry for entry in ROW_OF if module.startswith(f"{entry}_")]
    return ROW_OF[max(family, key=len)] if family else None


def module_name(path: Path, root: Path = TREE) -> str:
    """`vfu_server/host/__init__.py` -> `vfu_server.host`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path = TREE) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in the file, wherever it stands; `from a import b` counts as `a.b`."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def upward_arrows(root: Path = TREE) -> list[str]:
    """Every import of the package that points to a higher row, and every module that has no row."""
    wrong = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        own = module_name(path, root).removeprefix(PACKAGE).lstrip(".")
        row = row_of(own) if own else len(ROWS)
        where = path.relative_to(root).as_posix()
        if row is None:
            wrong.append(f"{where}: the module {own} is in no row; add it to ROWS in tests/test_layers.py")
            continue
        for line, name in imports_of(path, root):
            target = name.removeprefix(f"{PACKAGE}.")
            if target == name:
                continue
            wanted = row_of(target)
            if wanted is not None and wanted < row:
                wrong.append(f"{where}:{line}: {own or PACKAGE} imports {target}, which is a row above")
    return wrong


def test_no_import_points_up() -> None:
    assert upward_arrows() == []


def test_plugins_import_the_kit_only() -> None:
    wrong = [
        f"{path.relative_to(TREE)}:{line}: {name}"
        for folder in ("plugins", "examples")
        for path in sorted((TREE / folder).rglob("*.py"))
        if "tests" not in path.parts and not (path.name in GUESTS and {"models", "examples"} & {*path.parts})
        for line, name in imports_of(path)
        if name.startswith(f"{PACKAGE}.") and not allowed_in_plugins(name.removeprefix(f"{PACKAGE}."))
    ]
    assert wrong == []


def allowed_in_plugins(target: str) -> bool:
    return any(target == name or target.startswith((f"{name}.", f"{name}_")) for name in PLUGINS_MAY_IMPORT)


def test_build_needs_nothing_of_the_server() -> None:
    wrong = []
    for path in sorted((TREE / PACKAGE / "libvfio_user").rglob("*.py")):
        own = module_name(path).removeprefix(f"{PACKAGE}.")
        if own != "libvfio_user" and not own.startswith(BUILD):
            continue
        for line, name in imports_of(path):
            target = name.removeprefix(f"{PACKAGE}.")
            if target != name and not target.startswith(BUILD):
                wrong.append(f"{path.relative_to(TREE)}:{line}: {name}")
    assert wrong == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"errors.py": "from vfu_server import policy\n"}, "errors.py:1: errors imports policy"),
        ({"migration.py": "def f():\n    import vfu_server.session\n"}, "migration.py:2: migration imports session"),
        ({"host/kernel.py": "from ..testing import guest\n"}, "host/kernel.py:1: host.kernel imports testing.guest"),
        ({"host_device.py": "from .host import kernel\n"}, "host_device.py:1: host_device imports host.kernel"),
        ({"model.py": "from vfu_server.model_server import serve\n"}, "model.py:1: model imports model_server.serve"),
        ({"__init__.py": "from vfu_server import uapi\n"}, "__init__.py:1: vfu_server imports uapi"),
        ({"surprise.py": "\n"}, "surprise is in no row; add it to ROWS in tests/test_layers.py"),
    ],
)
def test_walk_finds(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    for name, text in files.items():
        file = tmp_path / PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found = upward_arrows(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


def test_walk_allows_what_points_down_or_aside(tmp_path: Path) -> None:
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "session.py").write_text(
        "from vfu_server import session_migration, uapi\nimport vfu_server.host.kernel\n"
    )
    (folder / "session_migration.py").write_text("from vfu_server.migration import Engine\n")
    assert upward_arrows(tmp_path) == []
