"""The parts of the test machine that can be looked at without booting it."""

import stat
import subprocess
from pathlib import Path

import pytest

from tools.debian_root import RootError
from tools.vm import devices, kernel_build
from tools.vm.initramfs import INIT, Cpio, early_modules
from tools.vm.kernel import Kernel
from tools.vm.machine import Share, shares_table

DEPENDENCIES = """\
kernel/fs/netfs/netfs.ko.xz:
kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs/netfs.ko.xz
kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz
kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz
kernel/drivers/virtio/virtio-mem.ko.xz:
"""


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        assert archive[at + 110 + length - 1] == 0
        data = at + (110 + length + 3) // 4 * 4
        at = data + (size + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert at == len(archive)
            return found
        found[name] = (mode, archive[data : data + size])


def test_archive_of_the_initial_file_system() -> None:
    cpio = Cpio()
    cpio.add("dev", stat.S_IFDIR | 0o755)
    cpio.add("bin", stat.S_IFLNK | 0o777, b"usr/bin")
    cpio.add("odd", stat.S_IFREG | 0o644, b"12345")
    assert entries(cpio.finish()) == {"dev": (0o40755, b""), "bin": (0o120777, b"usr/bin"), "odd": (0o100644, b"12345")}


def kernel_with(folder: Path, *early: str) -> Kernel:
    (folder / "modules.dep").write_text(DEPENDENCIES)
    return Kernel("stock", "6.12", folder / "vmlinuz", folder, early, iommufd=False)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    modules = early_modules(kernel_with(tmp_path, "9pnet_virtio", "9p", "virtio_mem"))
    assert [module.name.split(".")[0] for module in modules] == ["netfs", "9pnet", "9pnet_virtio", "9p", "virtio-mem"]
    assert modules[0] == tmp_path / "kernel/fs/netfs/netfs.ko.xz"


def test_kernel_without_a_needed_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RootError, match=r"^the kernel 6\.12 has no module squashfs$"):
        early_modules(kernel_with(tmp_path, "squashfs"))


def test_fragment_sets_each_option_once() -> None:
    text = kernel_build.FRAGMENT.read_text(encoding="utf-8")
    names = [line.split("=")[0] for line in text.splitlines() if line.startswith("CONFIG_")]
    assert len(names) == len(set(names)) == len(kernel_build.options(text)) > 100


def test_kernel_tools_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        RootError, match=r"needs make, gcc, flex, bison, bc, xz \(to install them: tools/system-packages"
    ):
        kernel_build.compile_kernel(tmp_path / "source.tar.xz", tmp_path)


def test_init_is_a_shell_script_without_errors() -> None:
    subprocess.run(["sh", "-n", str(INIT)], check=True)


def test_shares_and_devices_as_the_machine_gets_them() -> None:
    shares = [Share(Path("/a"), "/checkout"), Share(Path("/b"), "/results", writable=True)]
    assert [line.split()[:2] for line in shares_table(shares).splitlines()] == [
        ["share0", "/checkout"],
        ["share1", "/results"],
    ]
    assert [line.split()[2].split(",")[0] for line in shares_table(shares).splitlines()] == ["ro", "rw"]
    assert devices.edu().at(0x11) == ["-device", "edu,addr=0x11"]
    assert "file=/images/a,,b" in devices.nvme(Path("/images/a,b")).at(0x10)[1]
