"""What /sys tells, and the checks before opening: each thing that can be wrong, and the cure that is named."""

import errno
import resource

import pytest

from tests.host.conftest import BDF
from tests.host.tree import RELEASE, Machine
from vfu_server.errors import HostError
from vfu_server.host import checks
from vfu_server.host.checks import Status, Way
from vfu_server.host.ioctl import Kernel
from vfu_server.host.sysfs import Sysfs

PARENT = "0000:00:03.0"
OTHER = "0000:00:05.0"


@pytest.fixture
def sysfs(machine):
    return Sysfs(machine.root)


@pytest.fixture
def kernel(machine):
    return Kernel(root=machine.root)


def test_a_function_as_sysfs_has_it(machine, sysfs):
    machine.function(
        BDF,
        driver="mlx5_vfio_pci",
        group=12,
        cdev="vfio3",
        ids=(0x15B3, 0x101E),
        class_code=0x020000,
        parent=PARENT,
        reset="flr bus",
        numa=1,
    )
    function = sysfs.function(BDF)
    assert (function.vendor, function.device, function.subsystem_vendor, function.subsystem) == (
        0x15B3,
        0x101E,
        0x1AF4,
        0x1100,
    )
    assert (function.revision, function.class_code, function.driver, function.group) == (
        0x10,
        0x020000,
        "mlx5_vfio_pci",
        12,
    )
    assert (function.vfio_device, function.numa_node, function.physical_function) == ("vfio3", 1, PARENT)
    assert function.reset_methods == ("flr", "bus")
    assert function.on_vfio
    assert not function.blocks_group


def test_a_function_with_nothing(machine, sysfs):
    machine.function(BDF, driver="", group=-1)
    function = sysfs.function(BDF)
    assert (function.driver, function.group, function.vfio_device, function.numa_node) == ("", -1, "", -1)
    assert not function.on_vfio


def test_a_function_that_is_not_there(sysfs):
    with pytest.raises(HostError, match=r"no PCI function 0000:00:1f\.7") as failed:
        sysfs.function("0000:00:1f.7")
    assert failed.value.errno == errno.ENODEV
    assert failed.value.__notes__[0].startswith("lspci -D")


def test_members_of_a_group(machine, sysfs):
    machine.function(BDF)
    machine.function(OTHER, driver="nvme")
    machine.function("0000:00:06.0", group=8)
    assert [member.bdf for member in sysfs.members(7)] == [BDF, OTHER]
    assert sysfs.members(99) == []


# --- driver


def test_bound_to_vfio_pci(machine, sysfs):
    machine.function(BDF)
    assert checks.check_driver(sysfs, sysfs.function(BDF)).status is Status.OK


def test_bound_to_the_devices_own_driver(machine, sysfs):
    machine.function(BDF, driver="nvme")
    found = checks.check_driver(sysfs, sysfs.function(BDF))
    assert (found.status, found.errno) == (Status.FAIL, errno.ENODEV)
    assert found.text.startswith(f"{BDF} has the driver nvme; it has to be bound to vfio-pci")
    assert found.cure == (
        f"driverctl set-override {BDF} vfio-pci",
        "or, until the next boot:",
        "modprobe vfio-pci",
        f"echo vfio-pci > /sys/bus/pci/devices/{BDF}/driver_override",
        f"echo {BDF} > /sys/bus/pci/devices/{BDF}/driver/unbind",
        f"echo {BDF} > /sys/bus/pci/drivers_probe",
    )


def test_bound_to_nothing_needs_no_unbind(machine, sysfs):
    machine.function(BDF, driver="")
    found = checks.check_driver(sysfs, sysfs.function(BDF))
    assert found.text.startswith(f"{BDF} has no driver")
    assert not [line for line in found.cure if "unbind" in line]


def test_the_kernels_own_variant_is_recommended(machine, sysfs):
    machine.aliases(
        "vfio_pci:v000019E5d0000A255sv*sd*bc*sc*i* hisi_acc_vfio_pci",
        "vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci",
        "pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_core",
    )
    machine.function(BDF, driver="mlx5_core", ids=(0x15B3, 0x101E))
    machine.function(OTHER, driver="vfio-pci", ids=(0x15B3, 0x101E), group=8)
    machine.function("0000:00:06.0", driver="mlx5_vfio_pci", ids=(0x15B3, 0x101E), group=9)
    assert checks.check_driver(sysfs, sysfs.function(BDF)).cure[0] == f"driverctl set-override {BDF} mlx5_vfio_pci"
    plain = checks.check_driver(sysfs, sysfs.function(OTHER))
    assert (plain.status, plain.cure) == (Status.WARN, (f"driverctl set-override {OTHER} mlx5_vfio_pci",))
    assert checks.check_driver(sysfs, sysfs.function("0000:00:06.0")).status is Status.OK


def test_a_bridge_is_refused(machine, sysfs):
    machine.function(BDF, driver="pcieport", class_code=0x060400)
    found = checks.check_driver(sysfs, sysfs.function(BDF))
    assert (found.status, found.errno) == (Status.FAIL, errno.EINVAL)
    assert "is a PCI bridge (class 060400)" in found.text


# --- IOMMU and group


def test_an_iommu_is_there(machine, sysfs):
    machine.function(BDF)
    found = checks.check_iommu(sysfs, sysfs.function(BDF))
    assert (found.status, found.text) == (Status.OK, "IOMMU group 7, behind dmar0")


@pytest.mark.parametrize(
    ("processor", "cmdline", "cure"),
    [
        ("GenuineIntel", "quiet", "put intel_iommu=on on the kernel's command line"),
        ("GenuineIntel", "intel_iommu=off quiet", "take intel_iommu=off from the kernel's command line"),
        ("AuthenticAMD", "amd_iommu=off", "take amd_iommu=off from the kernel's command line"),
        ("AuthenticAMD", "quiet", None),
        ("GenuineIntel", "intel_iommu=on", None),
    ],
)
def test_the_iommu_is_off(tmp_path, processor, cmdline, cure):
    machine = Machine(tmp_path / "root", iommu="", processor=processor, cmdline=cmdline)
    machine.function(BDF, group=-1)
    sysfs = Sysfs(machine.root)
    found = checks.check_iommu(sysfs, sysfs.function(BDF))
    assert (found.status, found.errno) == (Status.FAIL, errno.ENODEV)
    assert "there is no IOMMU before" in found.text
    assert found.cure[0].startswith("switch it on in the firmware")
    assert found.cure[1:-1] == ((cure,) if cure else ())


def test_a_function_behind_no_iommu_of_several(machine, sysfs):
    machine.function(BDF, group=-1)
    assert "behind none of this machine's IOMMUs (dmar0)" in checks.check_iommu(sysfs, sysfs.function(BDF)).text


def test_no_iommu_mode_is_refused(machine, sysfs):
    machine.function(BDF, group_name="vfio-noiommu")
    found = checks.check_iommu(sysfs, sysfs.function(BDF))
    assert found.status is Status.FAIL
    assert "no-IOMMU mode" in found.text


def test_a_group_of_one_and_a_group_of_harmless_members(machine, sysfs):
    machine.function(BDF)
    assert checks.check_group(sysfs, sysfs.function(BDF)).text == "IOMMU group 7 is viable, alone"
    machine.function(PARENT, driver="pcieport", class_code=0x060400)
    machine.function(OTHER, driver="")
    machine.function("0000:00:06.0", driver="vfio-pci", cdev="vfio1")
    found = checks.check_group(sysfs, sysfs.function(BDF))
    assert (found.status, found.text) == (
        Status.OK,
        f"IOMMU group 7 is viable, shared with {PARENT}, {OTHER}, 0000:00:06.0",
    )


def test_a_group_with_somebody_elses_driver(machine, sysfs):
    machine.function(BDF)
    machine.function(OTHER, driver="snd_hda_intel")
    found = checks.check_group(sysfs, sysfs.function(BDF))
    assert (found.status, found.errno) == (Status.FAIL, errno.EPERM)
    assert f"not viable: {OTHER} (snd_hda_intel) must leave its driver" in found.text
    assert f"echo {OTHER} > /sys/bus/pci/devices/{OTHER}/driver/unbind" in found.cure


# --- token, permission


def test_tokens_between_pf_and_vf(machine, sysfs):
    machine.function(PARENT, driver="igb", group=6)
    machine.function(BDF, parent=PARENT)
    token = "0b4f1f6e-0000-4000-8000-1234567890ab"
    vf = sysfs.function(BDF)
    assert checks.check_token(sysfs, vf, "").status is Status.OK
    assert checks.check_token(sysfs, vf, token).errno == errno.EINVAL
    machine.rebind(PARENT, "vfio-pci")
    assert checks.check_token(sysfs, vf, "").errno == errno.EACCES
    assert checks.check_token(sysfs, vf, token).status is Status.OK
    assert checks.check_token(sysfs, sysfs.function(PARENT), "").status is Status.OK


def test_the_best_nodes_that_may_be_opened(machine, sysfs, kernel):
    machine.function(BDF, cdev="vfio0")
    function = sysfs.function(BDF)
    assert checks.usable_way(kernel, function) is None
    machine.group_nodes()
    assert checks.usable_way(kernel, function) is Way.GROUP
    machine.nodes("/dev/vfio/devices/vfio0")
    assert checks.usable_way(kernel, function) is Way.GROUP  # no /dev/iommu
    machine.cdev_nodes()
    assert checks.usable_way(kernel, function) is Way.CDEV
    no_iommu = Kernel(root=machine.root, may_use=lambda path: path.name != "iommu")
    assert checks.usable_way(no_iommu, function) is Way.GROUP


def test_missing_nodes(machine, sysfs, kernel):
    machine.function(BDF)
    machine.nodes("/dev/vfio/vfio")
    found = checks.check_permission(kernel, sysfs.function(BDF))
    assert (found.status, found.errno, found.cure) == (Status.FAIL, errno.ENOENT, ("modprobe vfio-pci",))
    assert found.text.startswith("missing: /dev/vfio/7;")
    machine.rebind(BDF, "nvme")
    assert "not bound to a VFIO driver" in checks.check_permission(kernel, sysfs.function(BDF)).text


def test_nodes_that_may_not_be_opened(machine, sysfs):
    machine.function(BDF)
    machine.group_nodes()
    kernel = Kernel(root=machine.root, may_use=lambda path: path.name == "vfio")
    found = checks.check_permission(kernel, sysfs.function(BDF))
    assert (found.status, found.errno) == (Status.FAIL, errno.EACCES)
    assert "may not open /dev/vfio/7." in found.text
    assert found.cure[0].endswith(":rw /dev/vfio/7")
    assert found.cure[0].startswith("setfacl -m u:")


# --- what only warns


@pytest.mark.parametrize(
    ("limit", "privileged", "status"),
    [
        (resource.RLIM_INFINITY, False, Status.OK),
        (8 << 20, True, Status.OK),
        (8 << 20, False, Status.WARN),
    ],
)
def test_locked_memory(limit, privileged, status):
    found = checks.check_memlock(limit, privileged=privileged)
    assert found.status is status
    assert ("at most 8 MiB" in found.text) is (status is Status.WARN)
    assert bool(found.cure) is (status is Status.WARN)


def test_whether_the_process_is_above_the_limit(machine, sysfs):
    assert checks.memlock_of_process(sysfs)[1]
    machine.capabilities("0000000000000000")
    assert not checks.memlock_of_process(sysfs)[1]
    machine.capabilities("0000000000004000")
    assert checks.memlock_of_process(sysfs)[1]
    (machine.root / "proc/self/status").unlink()
    assert not checks.memlock_of_process(sysfs)[1]


def test_the_limit_on_maps(machine, sysfs):
    assert checks.check_map_limit(sysfs, Way.CDEV).status is Status.OK
    assert checks.check_map_limit(sysfs, Way.GROUP).status is Status.OK
    machine.parameter("vfio_iommu_type1", "dma_entry_limit", "65535")
    assert checks.check_map_limit(sysfs, Way.GROUP).status is Status.OK
    machine.parameter("vfio_iommu_type1", "dma_entry_limit", "100")
    found = checks.check_map_limit(sysfs, Way.GROUP)
    assert (found.status, found.cure) == (
        Status.WARN,
        ("echo 65535 > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit",),
    )


def test_unsafe_interrupts(machine, sysfs):
    assert checks.check_interrupts(sysfs).status is Status.OK
    machine.parameter("vfio_iommu_type1", "allow_unsafe_interrupts", "N")
    assert checks.check_interrupts(sysfs).status is Status.OK
    machine.parameter("iommufd", "allow_unsafe_interrupts", "Y")
    assert checks.check_interrupts(sysfs).cure == ("echo N > /sys/module/iommufd/parameters/allow_unsafe_interrupts",)


def test_kernel_options(machine, sysfs):
    assert checks.check_kernel(sysfs, Way.CDEV).status is Status.OK
    assert checks.check_kernel(sysfs, None).text == f"Linux {RELEASE}"
    plain = checks.check_kernel(sysfs, Way.GROUP)
    assert plain.status is Status.WARN
    assert RELEASE in plain.text
    machine.config("CONFIG_IOMMUFD=m", "# CONFIG_VFIO_DEVICE_CDEV is not set")
    told = checks.check_kernel(sysfs, Way.GROUP)
    assert "built without CONFIG_VFIO_DEVICE_CDEV)" in told.text


def test_the_server_stops_at_the_first_failure(machine, sysfs, kernel):
    machine.function(BDF, driver="nvme", group=-1)
    found = list(checks.before_opening(kernel, sysfs, sysfs.function(BDF), ""))
    assert [each.name for each in found] == ["driver", "iommu", "group", "vf-token", "permission"]
    error = found[0].error()
    assert error.errno == errno.ENODEV
    assert error.__notes__ == list(found[0].cure)
