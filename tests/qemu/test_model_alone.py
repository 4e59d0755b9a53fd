"""Debian's QEMU as the client of a model, with no server between them: what docs/plugins/models.md promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lanes import lane_unavailable
from tests.qemu.qtest import machine
from tests.qemu.test_server import BAR, MEMORY, SLOT, place
from tests.server.programs import environment
from tools.debian_root import RootError
from tools.qemu_root import QemuRoot, qemu_root

pytestmark = pytest.mark.qemu

SECONDS = 60.0


@pytest.fixture(scope="module")
def qemu() -> QemuRoot:
    try:
        return qemu_root()
    except RootError as error:
        lane_unavailable(str(error))


def test_qemu_has_a_working_device_that_no_server_serves(qemu: QemuRoot, tmp_path: Path) -> None:
    path = tmp_path / "edu.sock"
    command = [sys.executable, "-P", "-m", "vfu_server.model_server", "edu", "--socket-path", str(path)]
    device = {"driver": "vfio-user-pci", "addr": f"{SLOT:#x}", "socket": {"type": "unix", "path": str(path)}}
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as model:
        try:
            assert model.stdout is not None
            assert model.stdout.readline() == f"ready {path}\n"
            with machine(qemu, [*MEMORY, "-device", json.dumps(device)]) as qtest:
                place(qtest)
                assert qtest.read(BAR, 4) == 0x010000ED
                qtest.write(BAR + 4, 4, 0x12345678)
                assert qtest.read(BAR + 4, 4) == 0xEDCBA987
        finally:
            model.terminate()
            model.communicate(timeout=SECONDS)
    assert model.returncode == 0
