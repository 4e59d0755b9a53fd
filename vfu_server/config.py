"""What the server is to do, as checked records: its devices, where they come from, and where their clients find them.

It must not know how the wish was uttered: the command line (`cli_arguments`) and TOML files (`config_file`) both end
here.
"""

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vfu_server.errors import UsageError

MMAP_MODES = ("never", "plugin", "all")
DIRTY_TRACKING_MODES = ("auto", "all")
MAX_NAME = 64
MAX_PORT = 65535

_BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]*")


class SourceKind(enum.Enum):
    """By what door a device is reached; the value is the option that says so."""

    BDF = "bdf"
    MODEL = "model"
    DEVICE_SOCKET = "device-socket"
    MDEV = "mdev"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a device comes from: a PCI address, the name of a plugin's model, another vfio-user server's socket, or the
    UUID of a mediated device.
    """

    kind: SourceKind
    value: str

    def __str__(self) -> str:
        return f"--{self.kind.value} {self.value}"


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """One device to serve. `fd` -1: listen at `socket_path`, else at systemd's socket or the default path.

    `machine`: the virtual machine that it belongs to together with other devices, if any.

    For a PCI function: `vf_token` the UUID that a VF of a vfio-pci PF needs; `vfio_fd`, `iommufd` what a launcher has
    opened (both or none).
    """

    name: str
    source: Source
    plugin: str = "auto"
    socket_path: str = ""
    fd: int = -1
    options: Mapping[str, str] = field(default_factory=dict)
    mmap: str = "plugin"
    dirty_tracking: str = "auto"
    allow_p2p: bool = False
    require_migration: bool = False
    revoke: bool = False
    machine: str = ""
    trace_regions: str = ""
    vf_token: str = ""
    vfio_fd: int = -1
    iommufd: int = -1


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """All of them, and what concerns the whole process."""

    devices: Sequence[DeviceConfig]
    socket_group: str = ""
    metrics: "MetricsAddress | None" = None
    log_level: str = "info"
    log_format: str = "text"


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """Where metrics can be read: a UNIX socket at `path`, or a TCP port of this machine's own `host` address."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path else f"{host}:{self.port}"


def metrics_address(text: str) -> MetricsAddress:
    """`unix:PATH` or `HOST:PORT`, HOST an address of the loopback. Raises UsageError."""
    if text.startswith("unix:"):
        if text == "unix:":
            raise UsageError("--metrics unix: names no path")
        return MetricsAddress(path=text.removeprefix("unix:"))
    import ipaddress

    host, colon, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > MAX_PORT:
        raise UsageError(f"--metrics {text}: give it as unix:PATH or HOST:PORT")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UsageError(f"--metrics {text}: {host!r} is no address: 127.0.0.1, [::1] or localhost") from None
    if not local:
        raise UsageError(
            f"--metrics {text}: only addresses of this machine's loopback: there is no authentication; "
            "let a proxy or an agent on this machine pass it on"
        )
    return MetricsAddress(host=host, port=int(port))


def source(kind: SourceKind, value: str) -> Source:
    """A checked source. A PCI address comes out in full, it and a UUID in lower case. Raises UsageError."""
    if kind is SourceKind.BDF:
        match = _BDF.fullmatch(value.lower())
        if match is None:
            raise UsageError(f"{value!r} is no PCI address: give it as lspci -D prints it, for instance 0000:3b:00.1")
        value = f"{match[1] or '0000'}:{match[2]}:{match[3]}.{match[4]}"
    elif kind is SourceKind.MDEV:
        value = value.lower()
        if _UUID.fullmatch(value) is None:
            raise UsageError(f"{value!r} is no mediated device: give its UUID, as /sys/bus/mdev/devices lists it")
    elif not value:
        raise UsageError(f"an empty --{kind.value} names nothing")
    return Source(kind, value)


def default_name(where: Source) -> str:
    """A device's name when nobody gave one: the PCI address, model or UUID, or the last part of the socket's path."""
    if where.kind is not SourceKind.DEVICE_SOCKET:
        return where.value
    stem = where.value.rpartition("/")[2].removesuffix(".sock").removesuffix(".socket")
    return re.sub(r"[^A-Za-z0-9_.:@+-]", "_", stem).lstrip("_.:@+-")[:MAX_NAME] or "device"


def check_name(name: str) -> str:
    """A name goes into paths, logs and metrics. Raises UsageError."""
    if _NAME.fullmatch(name) is None or len(name) > MAX_NAME:
        raise UsageError(
            f"{name!r} is no name for a device: letters, digits and, behind the first, any of _.:@+-, "
            f"at most {MAX_NAME} characters"
        )
    return name


def option(text: str) -> tuple[str, str]:
    """`K=V` taken apart. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--option {text}: give it as KEY=VALUE")
    return key, value


def expand_path(template: str, name: str, number: int, option: str = "--socket-path") -> str:
    """A path with `%n` (the device's name), `%i` (its number, from 0) and `%%`. Raises UsageError."""

    def replace(match: re.Match[str]) -> str:
        values = {"n": name, "i": str(number), "%": "%"}
        if match[1] not in values:
            raise UsageError(f"{option} {template}: {match[0]!r} is none of %n (name), %i (number) and %%")
        return values[match[1]]

    return re.sub(r"%(.?)", replace, template, flags=re.DOTALL)


def is_template(path: str) -> bool:
    """Whether the path differs from device to device."""
    return "%" in path.replace("%%", "")


def check_devices(devices: Sequence[DeviceConfig]) -> None:
    """Refuse devices that get in each other's way. Raises UsageError."""
    _refuse_twins("name", [device.name for device in devices], "give each a name of its own (name = in --config)")
    for kind in (SourceKind.BDF, SourceKind.MDEV):
        _refuse_twins(
            f"--{kind.value}",
            [d.source.value for d in devices if d.source.kind is kind],
            "a device can be served only once",
        )
    _refuse_twins(
        "--socket-path",
        [device.socket_path for device in devices if device.socket_path],
        "each device needs its own socket: use %n in the path, or one --socket-path for each",
    )
    _refuse_twins(
        "--trace-regions",
        [device.trace_regions for device in devices if device.trace_regions],
        "each device needs its own file: use %n in the name",
    )
    _refuse_twins("--fd", [str(device.fd) for device in devices if device.fd >= 0], "each device needs its own socket")


def _refuse_twins(what: str, values: Sequence[str], cure: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"two devices have {what} {value}: {cure}")
