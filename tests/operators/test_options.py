"""--metrics, --trace-regions and --revoke on the command line and in files, and what they mean together."""

import pytest

from tests.server.programs import run
from vfu_server import cli_arguments, cli_parser, config_file
from vfu_server.config import MetricsAddress
from vfu_server.errors import ConfigError, UsageError

FILE = """\
[server]
metrics = "unix:/run/m.sock"

[defaults]
socket-path = "/run/%n.sock"
trace-regions = "/var/%n-%i.trace"

[[device]]
model = "edu"

[[device]]
bdf = "0000:00:04.0"
revoke = true
trace-regions = "/tmp/100%%"
"""


def parsed(*arguments):
    return cli_arguments.server_config(cli_parser.build().parse_args([str(each) for each in arguments]))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(FILE)
    return path


def test_on_the_command_line():
    config = parsed("--model", "edu", "--model", "edu", "--socket-path", "/s/%n", "--trace-regions", "/t/%n-%i-%%")
    assert [device.trace_regions for device in config.devices] == ["/t/edu-0-%", "/t/edu-2-1-%"]
    assert [device.revoke for device in config.devices] == [False, False]
    assert config.metrics is None
    config = parsed("--bdf", "0000:00:04.0", "--revoke", "--metrics", "[::1]:9100")
    assert config.devices[0].revoke
    assert config.metrics == MetricsAddress(host="::1", port=9100)


def test_in_a_file(file):
    config = parsed("--config", file)
    assert [device.trace_regions for device in config.devices] == ["/var/edu-0.trace", "/tmp/100%"]
    assert [device.revoke for device in config.devices] == [False, True]
    assert config.metrics == MetricsAddress(path="/run/m.sock")


def test_the_command_line_prevails(file):
    config = parsed("--config", file, "--trace-regions", "/x/%n", "--metrics", "localhost:1", "--revoke")
    assert [device.trace_regions for device in config.devices] == ["/x/edu", "/x/0000:00:04.0"]
    assert all(device.revoke for device in config.devices)
    assert config.metrics == MetricsAddress(host="127.0.0.1", port=1)


def test_defaults_of_a_file_without_devices(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text('[defaults]\ntrace-regions = "/var/%n.trace"\nrevoke = true\n')
    (device,) = parsed("--config", path, "--bdf", "0000:00:04.0").devices
    assert (device.trace_regions, device.revoke) == ("/var/0000:00:04.0.trace", True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("unix:/run/m.sock", "0.0.0.0:1"), ":2: server.metrics: --metrics 0.0.0.0:1: only addresses of this machine"),
        (('"unix:/run/m.sock"', "5"), ":2: server.metrics: must be a string, not 5"),
        (("%n-%i", "%x"), ":6: defaults.trace-regions: --trace-regions /var/%x.trace: '%x' is none of %n"),
        (("100%%", "100%"), ":14: device[1].trace-regions: --trace-regions /tmp/100%: '%' is none of %n"),
        (("true", '"yes"'), ":13: device[1].revoke: must be true or false, not 'yes'"),
        (("/tmp/100%%", "/var/edu-0.trace"), "two devices have --trace-regions /var/edu-0.trace: each device needs"),
    ],
)
def test_complaints_name_file_line_and_field(tmp_path, change, complaint):
    path = tmp_path / "server.toml"
    path.write_text(FILE.replace(*change))
    with pytest.raises(ConfigError) as told:
        config_file.read(str(path))
    assert complaint in str(told.value)
    assert str(told.value).startswith(str(path))


def test_one_file_for_two_devices_is_refused():
    with pytest.raises(UsageError, match="two devices have --trace-regions /t: each device needs its own file"):
        parsed("--model", "edu", "--model", "edu", "--socket-path", "/s/%n", "--trace-regions", "/t")


def test_a_model_refuses_revoke_with_the_reason(folder):
    options = ("--plugin", "generic_dmaq", "--model", "edu", "--socket-path", folder / "a.sock", "--mmap", "all")
    done = run(*options, "--revoke")
    assert done.returncode == 2
    assert "--revoke: edu: it is behind another server's socket: only a kernel can take mappings away" in done.stderr
    assert not (folder / "a.sock").exists()


def test_help_tells_the_limits_of_revoke():
    said = " ".join(cli_parser.build().format_help().split())
    for words in ("not hostile ones", "a vCPU that still touches the device is killed", "answer EIO", "not on virtual"):
        assert words in said


def test_markdown_is_for_policies_only():
    done = run("--list-plugins", "--format", "markdown")
    assert done.returncode == 2
    assert "--format markdown goes with --show-policy" in done.stderr
