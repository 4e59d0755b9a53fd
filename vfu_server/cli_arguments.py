"""What the options mean together: a parsed command line, and the file it may name, become a `ServerConfig`.

It must not open anything but that file.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from vfu_server import config
from vfu_server.config import DeviceConfig, ServerConfig, Source, SourceKind
from vfu_server.errors import UsageError


def server_config(arguments: argparse.Namespace) -> ServerConfig:
    """The whole wish. Raises UsageError, ConfigError."""
    sources = _sources(arguments)
    base = DeviceConfig("", Source(SourceKind.MODEL, ""))
    from_file = ServerConfig(())
    if arguments.config is not None:
        from vfu_server import config_file

        file = config_file.read(arguments.config)
        from_file, base = file.server_config(), file.defaults
    if from_file.devices:
        _refuse_device_options(arguments, sources)
        template = arguments.trace_regions or ""
        devices = [
            _with_settings(device, arguments, number, template) for number, device in enumerate(from_file.devices)
        ]
    else:
        devices = _devices(arguments, sources, base)
    config.check_devices(devices)
    return replace(
        from_file,
        devices=devices,
        metrics=config.metrics_address(arguments.metrics) if arguments.metrics else from_file.metrics,
        socket_group=arguments.socket_group or from_file.socket_group,
        log_level=arguments.log_level or from_file.log_level,
        log_format=arguments.log_format or from_file.log_format,
    )


def options(arguments: argparse.Namespace) -> dict[str, str]:
    """`--option K=V`, together. Raises UsageError."""
    given: dict[str, str] = {}
    for text in arguments.option:
        key, value = config.option(text)
        if given.get(key, value) != value:
            raise UsageError(f"--option {key} is given twice, with {given[key]!r} and {value!r}")
        given[key] = value
    return given


def _sources(arguments: argparse.Namespace) -> list[Source]:
    """The devices that the options name; of one kind only, since each kind numbers its own."""
    by_kind = {
        SourceKind.BDF: arguments.bdf,
        SourceKind.MODEL: arguments.model,
        SourceKind.DEVICE_SOCKET: arguments.device_socket,
        SourceKind.MDEV: arguments.mdev,
    }
    used = [kind for kind, values in by_kind.items() if values]
    if len(used) > 1:
        names = " and ".join(f"--{kind.value}" for kind in used)
        raise UsageError(f"{names} exclude each other: name devices of different kinds in a --config file")
    return [config.source(kind, value) for kind in used for value in by_kind[kind]]


def _refuse_device_options(arguments: argparse.Namespace, sources: Sequence[Source]) -> None:
    given = [f"--{source.kind.value}" for source in sources[:1]]
    given += [f"--{name}" for name in ("plugin", "option", "fd") if getattr(arguments, name)]
    kernel = ("vf_token", "vfio_fd", "iommufd")
    given += [f"--{name.replace('_', '-')}" for name in kernel if getattr(arguments, name) is not None]
    given += ["--socket-path"] if arguments.socket_path else []
    if given:
        raise UsageError(
            f"{', '.join(given)}: {arguments.config} names the devices already; "
            "leave the option out, or the [[device]] tables in the file"
        )


def _with_settings(device: DeviceConfig, arguments: argparse.Namespace, number: int, trace: str) -> DeviceConfig:
    """`device` with those settings that the command line gives for all; `trace` is a template, not expanded yet."""
    if trace:
        device = replace(device, trace_regions=config.expand_path(trace, device.name, number, "--trace-regions"))
    return replace(
        device,
        plugin=arguments.plugin or device.plugin,
        mmap=arguments.mmap or device.mmap,
        dirty_tracking=arguments.dirty_tracking or device.dirty_tracking,
        allow_p2p=bool(arguments.allow_p2p) or device.allow_p2p,
        require_migration=bool(arguments.require_migration) or device.require_migration,
        revoke=bool(arguments.revoke) or device.revoke,
    )


def _devices(arguments: argparse.Namespace, sources: Sequence[Source], base: DeviceConfig) -> list[DeviceConfig]:
    if not sources:
        hint = f"{arguments.config} has no [[device]]; " if arguments.config else ""
        raise UsageError(f"{hint}no device is named: give --bdf, --model (no hardware needed) or --device-socket")
    names = _names(sources)
    paths = _socket_paths(arguments.socket_path, base.socket_path, names, bool(arguments.fd))
    fds = _fds(arguments.fd, len(sources))
    base = _with_kernel_door(base, arguments, sources)
    base = replace(base, options={**base.options, **options(arguments)})
    trace = arguments.trace_regions or base.trace_regions
    return [
        _with_settings(replace(base, name=name, source=source, socket_path=path, fd=fd), arguments, number, trace)
        for number, (name, source, path, fd) in enumerate(zip(names, sources, paths, fds, strict=True))
    ]


def _with_kernel_door(base: DeviceConfig, arguments: argparse.Namespace, sources: Sequence[Source]) -> DeviceConfig:
    """What only one function under kernel VFIO can be given."""
    given = {"vf_token": arguments.vf_token, "vfio_fd": arguments.vfio_fd, "iommufd": arguments.iommufd}
    given = {name: value for name, value in given.items() if value is not None}
    options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    if given and (len(sources) != 1 or sources[0].kind is not SourceKind.BDF):
        raise UsageError(f"{options}: goes with exactly one --bdf; for several, use --config")
    if ("vfio_fd" in given) != ("iommufd" in given):
        raise UsageError(f"{options}: --vfio-fd and --iommufd go together")
    if any(fd < 0 for fd in (arguments.vfio_fd or 0, arguments.iommufd or 0)):
        raise UsageError(f"{options}: a negative number is no file descriptor")
    return replace(base, **given)


def _names(sources: Sequence[Source]) -> list[str]:
    """Default names; the same model twice is told apart by a number."""
    names: list[str] = []
    for source in sources:
        name = plain = config.check_name(config.default_name(source))
        number = 2
        while name in names and source.kind not in (SourceKind.BDF, SourceKind.MDEV):
            name = f"{plain}-{number}"
            number += 1
        names.append(name)
    return names


def _socket_paths(given: Sequence[str], default: str, names: Sequence[str], fds: bool) -> list[str]:
    if given and fds:
        raise UsageError("--socket-path and --fd exclude each other: a device has one socket")
    if fds:
        return [""] * len(names)
    templates = list(given) or [default]
    if "" in given:
        raise UsageError("an empty --socket-path names nothing")
    if len(templates) == 1 and len(names) > 1:
        if templates[0] and not config.is_template(templates[0]):
            raise UsageError(
                f"--socket-path {templates[0]}: {len(names)} devices need {len(names)} sockets: "
                "use %n in the path (the device's name), or give one --socket-path for each"
            )
        templates *= len(names)
    if len(templates) != len(names):
        raise UsageError(f"{len(templates)} --socket-path for {len(names)} devices: give one for each, or one with %n")
    return [
        config.expand_path(template, name, number)
        for number, (template, name) in enumerate(zip(templates, names, strict=True))
    ]


def _fds(given: Sequence[int], count: int) -> list[int]:
    if not given:
        return [-1] * count
    if len(given) != count:
        raise UsageError(f"{len(given)} --fd for {count} devices: give one for each")
    for fd in given:
        if fd < 0:
            raise UsageError(f"--fd {fd} is no file descriptor")
    return list(given)
