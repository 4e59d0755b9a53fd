"""Configuration files: what is read, and that every complaint names file, line and field."""

import pytest

from tests.server.programs import run
from vfu_server import config_file
from vfu_server.config import DeviceConfig, Source, SourceKind
from vfu_server.errors import ConfigError

FULL = """\
# two devices
[server]
log-level = "debug"
log-format = "json"
socket-group = "kvm"

[defaults]
plugin = "mlx5"
socket-path = "/run/vfu/%n-%i.sock"
mmap = "never"
options = { trace = true, depth = 3 }

[[device]]
name = "nic0"
bdf = "3B:00.1"
require-migration = true

[device.options]
depth = 4
firmware = "28.41"

[[device]]
plugin = "generic_dmaq"
model = "edu"
mmap = "plugin"
dirty-tracking = "all"
fd = 7
"""


def read(tmp_path, text):
    path = tmp_path / "server.toml"
    path.write_text(text)
    return config_file.read(str(path))


def test_everything(tmp_path) -> None:
    file = read(tmp_path, FULL)
    assert file.devices == [
        DeviceConfig(
            name="nic0",
            source=Source(SourceKind.BDF, "0000:3b:00.1"),
            plugin="mlx5",
            socket_path="/run/vfu/nic0-0.sock",
            options={"trace": "true", "depth": "4", "firmware": "28.41"},
            mmap="never",
            require_migration=True,
        ),
        DeviceConfig(
            name="edu",
            source=Source(SourceKind.MODEL, "edu"),
            plugin="generic_dmaq",
            fd=7,
            options={"trace": "true", "depth": "3"},
            mmap="plugin",
            dirty_tracking="all",
        ),
    ]
    server = file.server_config()
    assert (server.log_level, server.log_format, server.socket_group) == ("debug", "json", "kvm")


ONE = '[[device]]\nmodel = "edu"\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[server]\nlog-level = \n", "2: Invalid value (column 13)"),
        ('[server]\nlog-level = "debug', "2: Unterminated string (the end of the file)"),
        ('[sever]\nlog-level = "debug"\n', "1: sever: unknown; here may stand: server, defaults, device"),
        ('\n[server]\n\nlog_level = "debug"\n', "4: server.log_level: unknown; here may stand: log-level, "),
        (
            '[server]\nlog-level = "loud"\n',
            "2: server.log-level: must be one of debug, info, warning, error, not 'loud'",
        ),
        ("[server]\nsocket-group = 5\n", "2: server.socket-group: must be a string, not 5"),
        ('server = "x"\n', "1: server: must be a table, not 'x'"),
        ('[device]\nmodel = "edu"\n', "1: device: must be an array of tables, not {"),
        ("device = [ 1 ]\n", "1: device[0]: must be a table"),
        (ONE + ONE + "x = 1\n", "5: device[1].x: unknown; here may stand: name, fd, bdf, model, device-socket, "),
        (ONE + 'bdf = "3b:00.0"\n', "1: device[0]: a device needs exactly one of bdf, model, device-socket, mdev; "),
        (
            '[[device]]\nname = "a"\n',
            "1: device[0]: a device needs exactly one of bdf, model, device-socket, mdev; this one has n",
        ),
        (
            '[[device]]\nbdf = "3b:00.9"\n',
            "2: device[0].bdf: '3b:00.9' is no PCI address: give it as lspci -D prints it",
        ),
        (ONE + 'name = "../x"\n', "3: device[0].name: '../x' is no name for a device: letters, digits"),
        (ONE + "require-migration = 1\n", "3: device[0].require-migration: must be true or false, not 1"),
        (ONE + "fd = true\n", "3: device[0].fd: must be an integer, not True"),
        (ONE + "fd = -2\n", "3: device[0].fd: -2 is no file descriptor"),
        (ONE + 'socket-path = "/a"\nfd = 3\n', "4: device[0].fd: stands beside socket-path: give one of them"),
        (ONE + 'mmap = "some"\n', "3: device[0].mmap: must be one of never, plugin, all, not 'some'"),
        (
            ONE + 'socket-path = "/run/%x.sock"\n',
            "3: device[0].socket-path: --socket-path /run/%x.sock: '%x' is none of",
        ),
        (
            ONE + "\n[device.options]\nlist = [1]\n",
            "5: device[0].options.list: must be a string, a number or a boolean",
        ),
        (ONE + 'options = { "a.b" = [] }\n', "3: device[0].options.a.b: must be a string"),
        (ONE + ONE, "1: device: two devices have name edu: give each a name of its own"),
        (
            '[defaults]\nsocket-path = "/run/vfu/a.sock"\n' + ONE + ONE + 'name = "b"\n',
            "2: defaults.socket-path: several devices need several sockets: use %n",
        ),
        (
            ONE + 'socket-path = "/a"\n' + ONE + 'name = "b"\nsocket-path = "/a"\n',
            "1: device: two devices have --socket-path /a: each device needs its own socket",
        ),
        ('[[device]]\nbdf = "3b:0.1"\n', "2: device[0].bdf: "),
        (
            '[[device]]\nname="a"\nbdf = "3b:00.1"\n[[device]]\nname="b"\nbdf = "0000:3B:00.1"\n',
            "1: device: two devices have --bdf 0000:3b:00.1: a device can be served only once",
        ),
        (f"# {'x' * config_file.MAX_FILE}\n", None),
    ],
)
def test_complaints(tmp_path, text, complaint) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    if complaint is None:
        assert str(caught.value).endswith("bytes are no configuration")
    else:
        assert str(caught.value).startswith(f"{tmp_path}/server.toml:{complaint}")
    assert "\n" not in str(caught.value)


def test_devices_of_one_machine(tmp_path) -> None:
    text = '[defaults]\nmachine = "one"\nsocket-path = "/x/%n"\n'
    text += '[[device]]\nname = "a"\nmodel = "edu"\n[[device]]\nname = "b"\nmodel = "edu"\nmachine = "two"\n'
    assert [device.machine for device in read(tmp_path, text).devices] == ["one", "two"]
    for wrong in (text.replace('"one"', '""'), text.replace('"two"', '"t w o"')):
        with pytest.raises(ConfigError, match=r"machine: .* is no name"):
            read(tmp_path, wrong)


def test_bytes_that_are_no_text(tmp_path) -> None:
    (tmp_path / "server.toml").write_bytes(b"# fine\n\n# \xff\n")
    with pytest.raises(ConfigError, match=r"server\.toml:3: not UTF-8"):
        config_file.read(str(tmp_path / "server.toml"))


def test_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*/none: No such file or directory"):
        config_file.read(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="Is a directory"):
        config_file.read(str(tmp_path))


def test_program_ends_with_the_code_for_configuration(tmp_path) -> None:
    (tmp_path / "server.toml").write_text(ONE + "mmap = 1\n")
    done = run("--config", tmp_path / "server.toml")
    assert done.returncode == 3
    assert done.stderr == f"vfu-server: error: {tmp_path}/server.toml:3: device[0].mmap: must be a string, not 1\n"
