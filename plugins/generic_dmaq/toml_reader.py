"""Reading a TOML file with named errors: each wrong, missing or unknown key is a ConfigError with file, line and field.

Knows kinds of values and where they stand; it must not know what a profile means.
"""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vfu_server import toml_lines
from vfu_server.errors import ConfigError

MAX_FILE = 1 << 20
"""Bytes of the longest file that is looked at."""


class Source:
    """The text of a file, for saying where something stands."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self._text = text
        self._lines: dict[toml_lines.Path, int] | None = None

    def error(self, path: toml_lines.Path, message: str) -> ConfigError:
        """A ConfigError about what stands at `path`; the lines are looked for only now."""
        if self._lines is None:
            self._lines = toml_lines.line_numbers(self._text)
        line = toml_lines.line_of(self._lines, path)
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        return ConfigError(f"{self.file}:{line}: {field}: {message}" if field else f"{self.file}: {message}")


class Table:
    """One table of the file. Each read takes the key; `finish` complains about keys that nobody took."""

    def __init__(self, source: Source, path: toml_lines.Path, values: Mapping[str, Any]) -> None:
        self.source = source
        self.path = path
        self._values = values
        self._taken: list[str] = []
        self._below: dict[str, list[Table]] = {}

    def error(self, key: str, message: str) -> ConfigError:
        """A ConfigError about `key` of this table; an empty key: about the table."""
        return self.source.error((*self.path, key) if key else self.path, message)

    def has(self, key: str) -> bool:
        """The key is there (and is taken)."""
        self._taken.append(key)
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        """All keys, in the file's order."""
        return iter(self._values)

    def value(self, key: str) -> Any:
        """Whatever stands there; missing is an error."""
        if not self.has(key):
            raise self.error("", f"{key} is missing")
        return self._values[key]

    def text(self, key: str, default: str | None = None) -> str:
        """A string without control characters."""
        if default is not None and not self.has(key):
            return default
        value = self.value(key)
        if not isinstance(value, str) or not value.isprintable():
            raise self.error(key, f"must be a line of text, not {value!r}")
        return value

    def word(self, key: str, known: tuple[str, ...], default: str | None = None) -> str:
        """One of `known`."""
        value = self.text(key, default)
        if value not in known:
            raise self.error(key, f"must be one of {', '.join(known)}, not {value!r}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer within `low` to `high`, both included."""
        if default is not None and not self.has(key):
            return default
        return self.checked_integer(key, self.value(key), low, high)

    def checked_integer(self, key: str, value: object, low: int, high: int) -> int:
        """`value` if it is an integer within the limits."""
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"must be a whole number from {low:#x} to {high:#x}, not {value!r}")
        return value

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of integers; missing: empty."""
        if not self.has(key):
            return ()
        value = self._values[key]
        if not isinstance(value, list) or not value:
            raise self.error(key, f"must be a list of numbers, not {value!r}")
        return tuple(self.checked_integer(key, one, low, high) for one in value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; missing: empty."""
        if not self.has(key):
            return ()
        value = self._values[key]
        if not isinstance(value, list) or not all(isinstance(one, str) and one.isprintable() for one in value):
            raise self.error(key, f"must be a list of names, not {value!r}")
        return tuple(value)

    def seconds(self, key: str, low: float, high: float, default: float) -> float:
        """A time in seconds within `low` to `high`."""
        if not self.has(key):
            return default
        value = self._values[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"must be a number of seconds from {low} to {high}, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        if not self.has(key):
            return default
        value = self._values[key]
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def table(self, key: str) -> "Table":
        """A table below this one; missing: an empty one."""
        value = self._values[key] if self.has(key) else {}
        if not isinstance(value, dict):
            raise self.error(key, f"must be a table, not {value!r}")
        if key not in self._below:
            self._below[key] = [Table(self.source, (*self.path, key), value)]
        return self._below[key][0]

    def tables(self, key: str) -> "list[Table]":
        """The elements of an array of tables; missing: none. Always the same ones: several readers may share them."""
        value = self._values[key] if self.has(key) else []
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self.error(key, f"must be tables in double brackets, [[{key}]]")
        if key not in self._below:
            path = (*self.path, key)
            self._below[key] = [Table(self.source, (*path, index), one) for index, one in enumerate(value)]
        return self._below[key]

    def finish(self) -> None:
        """ConfigError for a key that nobody asked for: a typing error must not be a silent default."""
        for key in self._values:
            if key not in self._taken:
                known = ", ".join(dict.fromkeys(self._taken))
                raise self.error(key, f"is not known here; known are {known}")


def read_toml(path: Path) -> Table:
    """The file's top table. ConfigError if it cannot be read or is no TOML."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", error.errno) from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"{path}: is longer than {MAX_FILE} bytes")
    try:
        text = data.decode()
        values = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: brackets are nested too deeply") from None
    return Table(Source(str(path), text), (), values)
