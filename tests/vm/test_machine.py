"""The machine itself: both kernels boot, see what they should, and a run that goes wrong says so."""

from pathlib import Path

import pytest

from tests.vm.lane import vm
from tools.vm.kernel import KernelName, kernel
from tools.vm.run import VmError

LIMITS = (8, 40, 200, 1000)
LOOK = """
uname -r
pwd
echo "$GREETING" >&2
ls /dev/vfio/vfio /dev/iommu 2>/dev/null
touch /checkout/written 2>/dev/null && echo "the checkout can be written"
echo kept >/results/file
python3 -c 'import vfu_server.cli, vfu_server.libvfio_user._native; print("the extension loads")'
exit 7
"""


@pytest.mark.parametrize("name", ["stock", "custom"])
def test_boots_runs_and_reports(name: KernelName, tmp_path: Path) -> None:
    command = ["sh", "-c", f"modprobe -q vfio-pci 2>/dev/null\n{LOOK}"]
    result = vm(command, tmp_path / "run", name, environment={"GREETING": "it's fine"})
    assert result.status == 7
    assert result.stderr == "it's fine\n"
    iommufd = ["/dev/iommu"] if kernel(name).iommufd else []
    found = [kernel(name).release, "/checkout", *iommufd, "/dev/vfio/vfio", "the extension loads"]
    assert result.stdout.splitlines() == found
    assert (result.folder / "results" / "file").read_text() == "kept\n"
    assert "Run /init as init process" in result.console


def test_command_that_does_not_end_is_ended(tmp_path: Path) -> None:
    # How long a boot takes is this machine's affair: the limit grows until the command was reached.
    for limit in LIMITS:
        folder = tmp_path / str(limit)
        with pytest.raises(VmError) as caught:
            vm(["sh", "-c", "echo so far so good; sleep 10000"], folder, "custom", timeout=limit)
        said = str(caught.value)
        assert said.startswith(f"the machine was still running after {limit} s")
        if "so far so good" in said:
            break
    assert "so far so good" in said
    assert "init: starting the job" in said
    assert (folder / "console.log").stat().st_size > 1000


def test_machine_that_goes_away_early_is_told(tmp_path: Path) -> None:
    with pytest.raises(VmError) as caught:
        vm(["sh", "-c", "echo farewell; busybox poweroff -f"], tmp_path / "run", "custom")
    said = str(caught.value)
    assert said.startswith("the machine ended before the command did")
    assert "farewell" in said
    assert "Power down" in said
