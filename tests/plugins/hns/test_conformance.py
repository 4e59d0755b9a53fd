"""The kit's conformance suite on each of the models, as `vfu-plugin check hns` runs it."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from plugins.hns.registers import KINDS

TREE = Path(__file__).resolve().parents[3]
SECONDS = 600


@pytest.mark.slow
@pytest.mark.deadline(2 * SECONDS)
@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_every_check_passes(tmp_path, kind):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "vfu_server.tools.plugin", "check", "hns", "--model", kind, "--junit", str(report)]
    done = subprocess.run(
        command, cwd=TREE, env=os.environ, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert len(cases) >= 17
    assert not [name for name, case in cases.items() if case.find("skipped") is not None], done.stdout
    assert not any(case.find(what) is not None for case in cases.values() for what in ("failure", "error"))
