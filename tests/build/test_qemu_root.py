"""QEMU out of Debian's packages: it starts, answers on its monitor and has the device that the server is for."""

import json
import os
import subprocess

import pytest

from tests.lanes import lane_unavailable
from tools.debian_root import RootError
from tools.qemu_root import OLDEST, QemuRoot, qemu_root, version

pytestmark = [pytest.mark.qemu, pytest.mark.deadline(300)]


@pytest.fixture(scope="module")
def qemu() -> QemuRoot:
    try:
        return qemu_root()
    except RootError as error:
        lane_unavailable(str(error))


def test_version_is_new_enough(qemu: QemuRoot) -> None:
    assert version(qemu) >= OLDEST


def test_machine_starts_and_knows_the_device(qemu: QemuRoot) -> None:
    command = [*qemu.argv, "-machine", "q35", "-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-qmp", "stdio"]
    questions = [
        {"execute": "qmp_capabilities"},
        {"execute": "query-status"},
        {"execute": "device-list-properties", "arguments": {"typename": "vfio-user-pci"}},
        {"execute": "quit"},
    ]
    done = subprocess.run(
        command,
        input="".join(json.dumps(question) for question in questions),
        env={**os.environ, **qemu.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    returned = [answer["return"] for answer in answers if "return" in answer]
    assert returned[1]["status"] == "prelaunch"
    assert "socket" in {entry["name"] for entry in returned[2]}
