"""A configuration file: TOML read into the records of `config`, every complaint with file, line and field.

It must not know the command line. The form:

    [server]                      log-level, log-format, socket-group, metrics
    [defaults]                    any field of a device but name, source, fd and vf-token; for all devices
    [[device]]                    name, plugin, one of bdf / model / device-socket / mdev, socket-path or fd,
                                  mmap, revoke, dirty-tracking, allow-p2p, require-migration, trace-regions, vf-token,
                                  machine
    [device.options]              what --option gives, for this device
"""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vfu_server import config, logs
from vfu_server.config import DeviceConfig, ServerConfig, Source, SourceKind
from vfu_server.errors import ConfigError, UsageError
from vfu_server.toml_lines import Path as KeyPath
from vfu_server.toml_lines import line_numbers, line_of

MAX_FILE = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Field:
    """What a field may hold. `choices` empty: anything of `kind`."""

    kind: type
    choices: Sequence[str] = ()


_SERVER = {
    "log-level": Field(str, logs.LEVELS),
    "log-format": Field(str, logs.FORMATS),
    "socket-group": Field(str),
    "metrics": Field(str),
}
_DEFAULTS = {
    "plugin": Field(str),
    "socket-path": Field(str),
    "mmap": Field(str, config.MMAP_MODES),
    "dirty-tracking": Field(str, config.DIRTY_TRACKING_MODES),
    "allow-p2p": Field(bool),
    "require-migration": Field(bool),
    "revoke": Field(bool),
    "machine": Field(str),
    "trace-regions": Field(str),
    "options": Field(dict),
}
_SOURCES = {kind.value: Field(str) for kind in SourceKind}
_DEVICE = {"name": Field(str), "fd": Field(int), **_SOURCES, "vf-token": Field(str), **_DEFAULTS}
_TOP = {"server": Field(dict), "defaults": Field(dict), "device": Field(list)}


@dataclass(frozen=True, slots=True)
class FileConfig:
    """What a file says. `server` as written and `defaults` are for the command line to prevail over."""

    server: Mapping[str, str]
    defaults: DeviceConfig
    devices: Sequence[DeviceConfig]

    def server_config(self) -> ServerConfig:
        """The file by itself."""
        given: dict[str, Any] = {key.replace("-", "_"): value for key, value in self.server.items()}
        if "metrics" in given:
            given["metrics"] = config.metrics_address(given["metrics"])
        return ServerConfig(self.devices, **given)


def read(path: str) -> FileConfig:
    """Read and check the file. Raises ConfigError."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"--config {path}: more than {MAX_FILE} bytes are no configuration")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax(path, text, str(error))) from None
    return _Reader(path, text).document(document)


def _syntax(path: str, text: str, message: str) -> str:
    """From tomllib: `... (at line 3, column 7)` or `(at end of document)`; put it where editors look for it."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if match is None:
        return f"{path}: {message}"
    if match[2] is None:
        return f"{path}:{len(text.splitlines()) or 1}: {match[1]} (the end of the file)"
    return f"{path}:{match[2]}: {match[1]} (column {match[3]})"


class _Reader:
    """Checks one document; knows which line each value is at."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._lines = line_numbers(text)

    def fail(self, where: KeyPath, problem: str) -> ConfigError:
        """The complaint about the value at `where` (or the nearest thing around it that has a line)."""
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
        return ConfigError(f"{self._path}:{line_of(self._lines, where)}: {name}: {problem}")

    def document(self, document: Mapping[str, Any]) -> FileConfig:
        """The whole file."""
        self._table((), document, _TOP)
        server = self._table(("server",), document.get("server", {}), _SERVER)
        if "metrics" in server:
            self._checked(("server", "metrics"), lambda: config.metrics_address(server["metrics"]))
        raw_defaults = self._table(("defaults",), document.get("defaults", {}), _DEFAULTS)
        if "machine" in raw_defaults:
            self._checked(("defaults", "machine"), lambda: config.check_name(raw_defaults["machine"]))
        no_source = Source(SourceKind.MODEL, "")
        defaults = self._fill(("defaults",), raw_defaults, DeviceConfig("", no_source))
        devices = [self._device(number, table, defaults) for number, table in enumerate(document.get("device", []))]
        paths = [self._path_of(number, device, len(devices)) for number, device in enumerate(devices)]
        traces = [self._trace_of(number, device) for number, device in enumerate(devices)]
        devices = [
            replace(device, socket_path=path, trace_regions=trace)
            for device, path, trace in zip(devices, paths, traces, strict=True)
        ]
        self._checked(("device",), lambda: config.check_devices(devices))
        return FileConfig(server, defaults, devices)

    def _table(self, where: KeyPath, table: object, fields: Mapping[str, Field]) -> Mapping[str, Any]:
        """`table`, made sure of: a table with known fields of the right kinds."""
        if not isinstance(table, dict):
            raise self.fail(where, "must be a table")
        for key, value in table.items():
            field = fields.get(key)
            if field is None:
                raise self.fail((*where, key), f"unknown; here may stand: {', '.join(fields)}")
            if type(value) is not field.kind:
                raise self.fail((*where, key), f"must be {_KIND_NAMES[field.kind]}, not {value!r}")
            if field.choices and value not in field.choices:
                raise self.fail((*where, key), f"must be one of {', '.join(field.choices)}, not {value!r}")
        return table

    def _device(self, number: int, written: object, defaults: DeviceConfig) -> DeviceConfig:
        where: KeyPath = ("device", number)
        table = self._table(where, written, _DEVICE)
        sources = [key for key in _SOURCES if key in table]
        if len(sources) != 1:
            found = "has " + " and ".join(sources) if sources else "has none"
            raise self.fail(where, f"a device needs exactly one of {', '.join(_SOURCES)}; this one {found}")
        key = sources[0]
        source = self._checked((*where, key), lambda: config.source(SourceKind(key), table[key]))
        name = table.get("name", config.default_name(source))
        self._checked((*where, "name"), lambda: config.check_name(name))
        if "fd" in table and "socket-path" in table:
            raise self.fail((*where, "fd"), "stands beside socket-path: give one of them")
        if table.get("fd", 0) < 0:
            raise self.fail((*where, "fd"), f"{table['fd']} is no file descriptor")
        if "machine" in table:
            self._checked((*where, "machine"), lambda: config.check_name(table["machine"]))
        token = table.get("vf-token", "")
        if token and source.kind is not SourceKind.BDF:
            raise self.fail((*where, "vf-token"), "goes with bdf")
        device = self._fill(where, table, replace(defaults, name=name, source=source, vf_token=token))
        return replace(device, fd=table["fd"], socket_path="") if "fd" in table else device

    def _fill(self, where: KeyPath, table: Mapping[str, Any], base: DeviceConfig) -> DeviceConfig:
        options = dict(base.options)
        for key, value in table.get("options", {}).items():
            if isinstance(value, bool):
                value = "true" if value else "false"
            if not isinstance(value, (str, int, float)):
                raise self.fail((*where, "options", key), "must be a string, a number or a boolean")
            options[key] = str(value)
        given = {key.replace("-", "_"): table[key] for key in _DEFAULTS if key in table and key != "options"}
        return replace(base, options=options, **given)

    def _path_of(self, number: int, device: DeviceConfig, count: int) -> str:
        where: KeyPath = ("device", number, "socket-path")
        if count > 1 and ("defaults", "socket-path") in self._lines and where not in self._lines:
            where = ("defaults", "socket-path")
            if not config.is_template(device.socket_path) and device.fd < 0:
                raise self.fail(where, "several devices need several sockets: use %n, for instance /run/vfu/%n.sock")
        return self._checked(where, lambda: config.expand_path(device.socket_path, device.name, number))

    def _trace_of(self, number: int, device: DeviceConfig) -> str:
        where: KeyPath = ("device", number, "trace-regions")
        if where not in self._lines and ("defaults", "trace-regions") in self._lines:
            where = ("defaults", "trace-regions")
        return self._checked(
            where, lambda: config.expand_path(device.trace_regions, device.name, number, "--trace-regions")
        )

    def _checked(self, where: KeyPath, check: Callable[[], T]) -> T:
        try:
            return check()
        except UsageError as error:
            raise self.fail(where, str(error)) from None


_KIND_NAMES = {str: "a string", bool: "true or false", int: "an integer", dict: "a table", list: "an array of tables"}
