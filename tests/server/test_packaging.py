"""What distributions install beside the program: units, descriptor and example fit the program that they speak of."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lanes import lane_unavailable
from tests.server.programs import TREE, Server, command
from tests.server.test_serving import EDU, client_of, edu_id
from vfu_server import capabilities, cli_arguments, cli_parser, config_file
from vfu_server.config import SourceKind

PACKAGING = TREE / "packaging"
BDF = "0000:3b:00.1"


def unit(name: str) -> dict[str, list[str]]:
    """Settings of a unit; one that is given twice has two values."""
    found: dict[str, list[str]] = {}
    for line in (PACKAGING / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("options", ["", "--socket-group kvm --require-migration"])
def test_command_of_the_unit_is_one_that_the_program_takes(options) -> None:
    settings = unit("vfu-server@.service")
    (line,) = settings["ExecStart"]
    (default,) = (value.partition("=")[2] for value in settings["Environment"])
    line = line.replace("%i", BDF).replace("${VFU_PLUGIN}", default).replace("$VFU_OPTIONS", options)
    program, *arguments = line.split()
    assert Path(program).name == "vfu-server"
    (device,) = cli_arguments.server_config(cli_parser.build().parse_args(arguments)).devices
    assert (device.source.value, device.plugin) == (BDF, "auto")
    assert f"/run/{settings['RuntimeDirectory'][0]}/{device.name}.sock" == unit("vfu-server@.socket")["ListenStream"][
        0
    ].replace("%i", BDF)


def test_descriptor_says_what_the_program_says() -> None:
    descriptor = json.loads((PACKAGING / "50-vfu-server.json").read_text())
    said = capabilities.capabilities()
    assert descriptor["type"] == said["type"]
    assert descriptor["features"] == said["features"]
    assert Path(descriptor["binary"]).is_absolute()
    assert descriptor["description"]


def test_example_file_is_accepted_and_shows_every_field() -> None:
    file = config_file.read(str(PACKAGING / "server.toml"))
    assert {device.source.kind for device in file.devices} == {SourceKind.BDF, SourceKind.MODEL}
    assert [device.socket_path for device in file.devices] == [f"/run/vfu/{n}.sock" for n in ("nic0", "dma0", "try")]
    text = (PACKAGING / "server.toml").read_text()
    fields = {*config_file._SERVER, *config_file._DEFAULTS} - {"options"}
    assert not [field for field in fields if not re.search(rf"^{field} = ", text, re.MULTILINE)]


RESTRICTED = """
import ctypes, os, sys
prctl = ctypes.CDLL(None, use_errno=True).prctl
if os.geteuid() == 0:
    for capability in range(64):
        prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; those that do not exist answer EINVAL
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, from Linux 6.3: no memory is both writable and executable
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_program_serves_without_capabilities_and_without_writable_code(folder, monkeypatch) -> None:
    """What the unit takes away and a test can take away without systemd."""
    whole = [sys.executable, "-c", RESTRICTED]
    monkeypatch.setattr("tests.server.programs.command", lambda *arguments: [*whole, *command(*arguments)])
    with Server(*EDU, "--socket-path", folder / "edu.sock") as server:
        server.wait_log("listening at")
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        with client_of(folder / "edu.sock") as client:
            assert edu_id(client) == 0x010000ED
        assert server.end()[0] == 0


@pytest.mark.slow
def test_systemd_finds_the_units_sound_and_safe(folder) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        lane_unavailable("systemd-analyze is not installed (package systemd)")
    program = folder / "vfu-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    units = []
    for kind in ("service", "socket"):
        target = folder / f"vfu-server@.{kind}"
        target.write_text((PACKAGING / target.name).read_text().replace("/usr/bin/vfu-server", str(program)))
        units.append(str(target))
    done = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        [analyze, "security", "--offline=yes", "--threshold=15", units[0]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
