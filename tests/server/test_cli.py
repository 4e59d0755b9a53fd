"""The command line: what is refused, with which words and which exit code. No mistake of a user shows a traceback."""

import json
import os
import re
import subprocess

import pytest

from tests.server.programs import PROBE, command, environment, install, run
from vfu_server import cli_arguments, cli_parser
from vfu_server.config import DeviceConfig, Source, SourceKind
from vfu_server.errors import UsageError
from vfu_server.exit_codes import MEANINGS, ExitCode


def parse(*arguments):
    return cli_arguments.server_config(cli_parser.build().parse_args(arguments))


UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


def bdf(address) -> Source:
    return Source(SourceKind.BDF, address)


def test_one_device() -> None:
    config = parse(
        *("--plugin", "mlx5", "--bdf", "3b:00.1", "--option", "a=b=c", "--option", "trace=", "--mmap", "never"),
        *("--dirty-tracking", "all", "--require-migration", "--socket-path=/run/a.sock", "--socket-group", "kvm"),
    )
    assert config.devices == [
        DeviceConfig(
            name="0000:3b:00.1",
            source=bdf("0000:3b:00.1"),
            plugin="mlx5",
            socket_path="/run/a.sock",
            options={"a": "b=c", "trace": ""},
            mmap="never",
            dirty_tracking="all",
            require_migration=True,
        )
    ]
    assert (config.socket_group, config.log_level, config.log_format) == ("kvm", "info", "text")


def test_defaults() -> None:
    (device,) = parse("--model", "edu").devices
    assert device == DeviceConfig(name="edu", source=Source(SourceKind.MODEL, "edu"))
    assert (device.plugin, device.mmap, device.dirty_tracking, device.fd) == ("auto", "plugin", "auto", -1)


def test_several_devices() -> None:
    config = parse("--bdf", "3b:00.1", "--bdf", "0001:3B:00.2", "--socket-path", "/run/vfu/%i-%n-%%.sock")
    assert [device.socket_path for device in config.devices] == [
        "/run/vfu/0-0000:3b:00.1-%.sock",
        "/run/vfu/1-0001:3b:00.2-%.sock",
    ]
    config = parse("--model", "edu", "--model", "edu", "--model", "ioat", "--fd", "5", "--fd", "3", "--fd", "4")
    assert [(device.name, device.fd) for device in config.devices] == [("edu", 5), ("edu-2", 3), ("ioat", 4)]
    config = parse("--bdf", "3b:00.1", "--bdf", "3b:00.2", "--socket-path", "/a", "--socket-path", "/b")
    assert [device.socket_path for device in config.devices] == ["/a", "/b"]
    config = parse("--bdf", "3b:00.1", "--bdf", "3b:00.2")
    assert [device.socket_path for device in config.devices] == ["", ""]


def test_device_socket_gives_a_name() -> None:
    (device,) = parse("--device-socket", "/run/other/nic 0.sock").devices
    assert (device.name, device.source.value) == ("nic_0", "/run/other/nic 0.sock")
    assert parse("--device-socket", "/run/..sock").devices[0].name == "device"


def test_mediated_devices() -> None:
    config = parse("--mdev", UUID.upper(), "--mdev", UUID.replace("5", "6"), "--plugin", "vfio")
    assert [device.name for device in config.devices] == [UUID, UUID.replace("5", "6")]
    assert config.devices[0].source == Source(SourceKind.MDEV, UUID)


REFUSED = [
    (("--mdev", "mtty"), "'mtty' is no mediated device: give its UUID"),
    (("--mdev", UUID, "--mdev", UUID.upper()), f"two devices have name {UUID}"),
    (("--mdev", UUID, "--bdf", "3b:00.1"), "--bdf and --mdev exclude each other"),
    ((), "no device is named: give --bdf, --model (no hardware needed) or --device-socket"),
    (("--bdf", "nic0"), "'nic0' is no PCI address: give it as lspci -D prints it, for instance 0000:3b:00.1"),
    (("--bdf", "3b:00.8"), "is no PCI address"),
    (("--bdf", "3b:20.0"), "is no PCI address"),
    (("--model", ""), "an empty --model names nothing"),
    (
        ("--bdf", "3b:00.1", "--model", "edu"),
        "--bdf and --model exclude each other: name devices of different kinds",
    ),
    (("--model", "a", "--device-socket", "/x"), "--model and --device-socket exclude each other"),
    (("--bdf", "3b:00.1", "--bdf", "0000:3B:00.1"), "two devices have name 0000:3b:00.1"),
    (("--model", "edu", "--fd", "3", "--socket-path", "/a"), "--socket-path and --fd exclude each other"),
    (("--model", "edu", "--fd", "-1"), "--fd -1 is no file descriptor"),
    (("--model", "edu", "--fd", "3", "--fd", "4"), "2 --fd for 1 devices: give one for each"),
    (("--model", "a", "--model", "b", "--fd", "4", "--fd", "4"), "two devices have --fd 4"),
    (("--model", "edu", "--socket-path", ""), "an empty --socket-path names nothing"),
    (
        ("--model", "edu", "--socket-path", "/a/%p"),
        "--socket-path /a/%p: '%p' is none of %n (name), %i (number)",
    ),
    (("--model", "edu", "--socket-path", "/a/%"), "'%' is none of"),
    (
        ("--model", "a", "--model", "b", "--socket-path", "/a"),
        "--socket-path /a: 2 devices need 2 sockets: use %n in the path (the device's name), or give one",
    ),
    (("--model", "a", "--model", "b", "--socket-path", "/a%%"), "2 devices need 2 sockets"),
    (
        ("--model", "a", "--socket-path", "/a", "--socket-path", "/b"),
        "2 --socket-path for 1 devices: give one",
    ),
    (
        ("--model", "a", "--model", "b", "--socket-path", "/a", "--socket-path", "/a"),
        "two devices have --socket-path /a: each device needs its own socket",
    ),
    (("--model", "edu", "--option", "x"), "--option x: give it as KEY=VALUE"),
    (("--model", "edu", "--option", "=x"), "--option =x: give it as KEY=VALUE"),
    (("--model", "edu", "--option", "a=1", "--option", "a=2"), "--option a is given twice, with '1' and '2'"),
    (("--model", "../x"), "'../x' is no name for a device"),
]


@pytest.mark.parametrize(("arguments", "complaint"), REFUSED)
def test_refused_combinations(arguments, complaint) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    assert complaint in str(caught.value)


def test_file_and_options(tmp_path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(
        '[server]\nlog-level = "error"\nsocket-group = "kvm"\n[defaults]\nmmap = "all"\nplugin = "mlx5"\n'
        '[[device]]\nmodel = "edu"\nmmap = "plugin"\n[[device]]\nbdf = "3b:00.1"\n'
    )
    config = parse("--config", str(path), "--log-level", "debug", "--mmap", "never")
    assert (config.log_level, config.socket_group) == ("debug", "kvm")
    assert [device.mmap for device in config.devices] == ["never", "never"]
    for extra, named in (
        (("--bdf", "3b:00.2"), "--bdf"),
        (("--plugin", "x", "--option", "a=b"), "--plugin, --option"),
        (("--socket-path", "/a"), "--socket-path"),
    ):
        with pytest.raises(UsageError, match=f"{named}: .*server.toml names the devices already; leave the option out"):
            parse("--config", str(path), *extra)


def test_file_without_devices_gives_settings_for_those_of_the_command_line(tmp_path) -> None:
    path = tmp_path / "server.toml"
    path.write_text('[defaults]\nmmap = "all"\nsocket-path = "/run/x/%n"\noptions = { a = 1, b = 2 }\n')
    (device,) = parse("--config", str(path), "--model", "edu", "--option", "b=3").devices
    assert (device.mmap, device.socket_path, device.options) == ("all", "/run/x/edu", {"a": "1", "b": "3"})
    with pytest.raises(UsageError, match=r"server\.toml has no \[\[device\]\]; no device is named"):
        parse("--config", str(path))


TAKER = ("--plugin", "taker", "--model", "x")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--no-such-option",), 2, "unrecognized arguments: --no-such-option"),
        (("--plug", "x"), 2, "unrecognized arguments: --plug x"),
        (("--mmap", "some"), 2, "argument --mmap: invalid choice: 'some'"),
        (("--fd", "three"), 2, "argument --fd: invalid int value: 'three'"),
        (("--bdf", "x"), 2, "'x' is no PCI address"),
        (("--vf-token", "x", "--model", "edu"), 2, "--vf-token: goes with exactly one --bdf"),
        (("--vf-token", "x", "--bdf", "3b:00.1", "--bdf", "3b:00.2"), 2, "--vf-token: goes with exactly one --bdf"),
        (("--vfio-fd", "3", "--bdf", "3b:00.1"), 2, "--vfio-fd and --iommufd go together"),
        (("--vfio-fd", "-3", "--iommufd", "4", "--bdf", "3b:00.1"), 2, "a negative number is no file descriptor"),
        (("--list-plugins", "--show-policy"), 2, "argument --show-policy: not allowed with argument --list-plugins"),
        (("--model", "edu", "--format", "json"), 2, "--format goes with --show-policy or --list-plugins"),
        (("--config", "/nowhere/at.toml", "--model", "edu"), 3, "--config /nowhere/at.toml: No such file or directory"),
        (("--plugin", "nope", "--show-policy"), 3, "there is no plugin 'nope'; installed: "),
        (("--plugin", "taker", "--model", "nope"), 2, "--model nope: plugin 'taker' has no such model; it has: none"),
        (("--plugin", "taker", "--device-socket", "/nowhere/at.sock"), 4, "No such file or directory"),
        (
            ("--plugin", "taker", "--model", "x", "--socket-path", "/nowhere/at.sock"),
            5,
            "the directory of /nowhere/at.sock",
        ),
        (("--plugin", "taker", "--model", "x", "--fd", "99"), 5, "--fd 99: Bad file descriptor: it was not inherited"),
        (
            ("--plugin", "taker", "--model", "x", "--socket-group", "nope"),
            2,
            "--socket-group nope: there is no such group",
        ),
    ],
)
def test_exit_codes_of_mistakes(folder, arguments, code, words) -> None:
    site = install(folder / "site", "taker_plugin", {"taker": PROBE})
    done = run(*arguments, sites=[site], RUNTIME_DIRECTORY=str(folder))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("vfu-server: error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert os.listdir(folder) == ["site"]


def test_help_teaches(folder) -> None:
    done = run("--help")
    assert done.returncode == 0
    for code, meaning in MEANINGS.items():
        assert re.search(rf"^ +{code.value}  {re.escape(meaning)}$", done.stdout, re.MULTILINE)
    assert set(MEANINGS) == set(ExitCode)
    examples = re.findall(r"^    vfu-server (.*)$", done.stdout, re.MULTILINE)
    assert len(examples) >= 4
    for example in examples:
        arguments = cli_parser.build().parse_args(example.split())
        if not arguments.show_policy and not arguments.config:
            assert cli_arguments.server_config(arguments).devices


@pytest.mark.parametrize(
    ("imports", "unwanted"),
    [
        ("cli, cli_parser", {"trio", "pluggy", "cffi", "_cffi_backend", "vfu_server.device"}),
        (
            "cli, cli_parser, cli_arguments, server",
            {"pluggy", "_cffi_backend", "vfu_server.session", "vfu_server.device"},
        ),
        ("cli, cli_parser, cli_arguments, server, plugins, server_device", {"tomllib"}),
    ],
    ids=["help", "until it listens", "until it serves"],
)
def test_start_is_lean(imports, unwanted) -> None:
    """What each step of the start does without: imports are most of its time."""
    program = f"import sys\nfrom vfu_server import {imports}\nprint(*sys.modules)"
    done = subprocess.run([command()[0], "-c", program], env=environment(), capture_output=True, text=True, check=True)
    assert not ({"rich", "msgspec", "importlib.metadata", "email"} | unwanted) & set(done.stdout.split())


def test_show_policy() -> None:
    done = run("--plugin", "generic_dmaq", "--show-policy", "--mmap", "never")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("generic_dmaq: ")
    for word in ("edu", "ioat", "BAR0", "running", "stopped", "resuming"):
        assert word in done.stdout
    said = json.loads(run("--plugin", "generic_dmaq", "--show-policy", "--format", "json").stdout)
    assert {"edu", "ioat"} <= set(said["generic_dmaq"])
    assert said["generic_dmaq"]["edu"]["p2p"] is False
    assert said["generic_dmaq"]["edu"]["mmap"] == "plugin"
    done = run("--plugin", "generic_dmaq", "--show-policy", "--option", "profile=/nowhere/chip.toml")
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)
    assert "/nowhere/chip.toml" in done.stderr


def test_reader_of_the_output_has_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("--list-plugins"), env=environment(PYTHONUNBUFFERED="1"), stdout=writer, stderr=-1, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
