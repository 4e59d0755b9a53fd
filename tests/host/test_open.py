"""Opening a function: the calls in the kernel's order, by group and by device node, and every way in which it fails."""

import errno
import os

import pytest
from trio.testing import trio_test

from tests.host.conftest import BDF
from tests.host.fake_function import FakeFunction
from tests.host.fake_kernel import FakeKernel
from vfu_server.errors import HostError, UsageError
from vfu_server.host import ioctl
from vfu_server.host.checks import Way
from vfu_server.host.kernel import open_bdf, open_mdev

TOKEN = "0b4f1f6e-0000-4000-8000-1234567890ab"


async def refused(fake: FakeKernel, **options) -> HostError:
    with pytest.raises(HostError) as failed:
        await open_bdf(BDF, kernel=fake.kernel, **options)
    for kind in ("container", "group", "device", "unbound", "cdev", "iommufd"):
        assert fake.opened(kind) == []
    return failed.value


@trio_test
async def test_by_group(by_group, function):
    host = await open_bdf(BDF, kernel=by_group.kernel)
    assert host.attachment.way is Way.GROUP
    assert by_group.requests[:6] == [
        ioctl.GET_API_VERSION,
        ioctl.CHECK_EXTENSION,
        ioctl.GROUP_GET_STATUS,
        ioctl.GROUP_SET_CONTAINER,
        ioctl.SET_IOMMU,
        ioctl.GROUP_GET_DEVICE_FD,
    ]
    await host.aclose()
    assert function.calls[0] == "opened"
    assert by_group.opened("device") == []
    assert function.calls[-1] == "released"


@trio_test
async def test_by_device_node(by_cdev, function):
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    assert host.attachment.way is Way.CDEV
    assert by_cdev.requests[:5] == [
        ioctl.DEVICE_BIND_IOMMUFD,
        ioctl.IOMMU_IOAS_ALLOC,
        ioctl.IOMMU_GET_HW_INFO,
        ioctl.IOMMU_HWPT_ALLOC,
        ioctl.DEVICE_ATTACH_IOMMUFD_PT,
    ]
    assert not host.attachment.tracks_dirty_pages
    assert host.dirty_source == ""
    await host.aclose()
    await host.aclose()
    assert by_cdev.opened("iommufd") == []
    assert function.calls == ["opened", "attached hwpt", *function.calls[2:-1], "released"]


@trio_test
async def test_an_iommu_that_tells_dirty_pages(by_cdev):
    by_cdev.hw_capabilities = 1
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    assert host.attachment.tracks_dirty_pages
    assert host.dirty_source == "the IOMMU"
    await host.aclose()


@trio_test
async def test_a_kernel_without_page_tables_of_our_own(by_cdev, function):
    by_cdev.has_hwpt = False
    host = await open_bdf(BDF, kernel=by_cdev.kernel)
    assert "attached ioas" in function.calls
    await host.aclose()


@trio_test
async def test_open_fds_from_a_launcher(by_cdev):
    by_cdev.denied |= {"/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/7"}
    fds = by_cdev._new_file("unbound", by_cdev.functions[BDF]), by_cdev._new_file("iommufd", [])
    host = await open_bdf(BDF, kernel=by_cdev.kernel, vfio_fd=fds[0], iommu_fd=fds[1])
    assert host.read(7, 0, 4) == 0x11E81234
    await host.aclose()


@trio_test
async def test_fds_from_a_launcher_are_closed_if_it_fails(by_cdev, machine):
    machine.rebind(BDF, "nvme")
    (machine.root / "sys/bus/pci/devices" / BDF / "vfio-dev" / "vfio0").rmdir()
    fds = by_cdev._new_file("unbound", by_cdev.functions[BDF]), by_cdev._new_file("iommufd", [])
    error = await refused(by_cdev, vfio_fd=fds[0], iommu_fd=fds[1])
    assert "has the driver nvme" in str(error)


@trio_test
async def test_an_unbound_function_is_refused_with_the_commands_that_bind_it(by_group, machine):
    machine.rebind(BDF, "nvme")
    (machine.root / "sys/bus/pci/devices" / BDF / "vfio-dev" / "vfio0").rmdir()
    error = await refused(by_group)
    assert error.errno == errno.ENODEV
    assert f"driverctl set-override {BDF} vfio-pci" in error.__notes__


@trio_test
async def test_a_function_that_is_not_there(by_group):
    with pytest.raises(HostError, match=r"no PCI function 0000:00:09\.0"):
        await open_bdf("0000:00:09.0", kernel=by_group.kernel)


@trio_test
async def test_nothing_is_opened_without_permission(by_group):
    by_group.denied |= {"/dev/vfio/7"}
    error = await refused(by_group)
    assert error.errno == errno.EACCES
    assert by_group.requests == []


@trio_test
async def test_a_group_that_another_process_has(by_group):
    other = by_group.open("/dev/vfio/7")
    with pytest.raises(HostError, match="another process has it") as failed:
        await open_bdf(BDF, kernel=by_group.kernel)
    assert failed.value.errno == errno.EBUSY
    assert failed.value.__notes__ == ["fuser -v /dev/vfio/7"]
    os.close(other)


@trio_test
async def test_a_group_that_is_not_viable_though_sysfs_says_so(by_group):
    by_group.viable = False
    assert (await refused(by_group)).errno == errno.EPERM


@trio_test
async def test_no_interrupt_remapping(fake):
    fake.unsafe = True
    error = await refused(fake)
    assert error.errno == errno.EPERM
    assert "no interrupt remapping" in str(error)
    assert any("allow_unsafe_interrupts" in note for note in error.__notes__)


@trio_test
async def test_a_device_node_in_use(by_cdev):
    first = await open_bdf(BDF, kernel=by_cdev.kernel)
    with pytest.raises(HostError, match="it is in use already") as failed:
        await open_bdf(BDF, kernel=by_cdev.kernel)
    assert failed.value.errno == errno.EINVAL
    assert failed.value.__notes__ == ["fuser -v /dev/vfio/devices/vfio0"]
    await first.aclose()
    again = await open_bdf(BDF, kernel=by_cdev.kernel)
    await again.aclose()


@trio_test
async def test_a_device_node_whose_group_is_in_use(by_cdev):
    other = by_cdev.open("/dev/vfio/7")
    with pytest.raises(HostError, match="group is in use") as failed:
        await open_bdf(BDF, kernel=by_cdev.kernel)
    assert failed.value.errno == errno.EBUSY
    os.close(other)


@trio_test
async def test_a_token_goes_with_the_name_or_the_bind(fake, machine):
    machine.function("0000:00:03.0", group=6)
    machine.rebind("0000:00:03.0", "vfio-pci")
    (machine.root / "sys/bus/pci/devices" / BDF / "physfn").symlink_to("../0000:00:03.0")
    fake.tokens[BDF] = TOKEN
    missing = await refused(fake)
    assert missing.errno == errno.EACCES
    wrong = await refused(fake, vf_token="0b4f1f6e-0000-4000-8000-000000000000")
    assert (wrong.errno, "token is missing or wrong" in str(wrong)) == (errno.EACCES, True)
    host = await open_bdf(BDF, kernel=fake.kernel, vf_token=TOKEN)
    assert "virtual function" in host.cannot_revoke
    await host.aclose()
    with pytest.raises(UsageError, match="is no vf token"):
        await open_bdf(BDF, kernel=fake.kernel, vf_token="secret")


@trio_test
async def test_a_function_that_describes_itself_wrongly_is_closed_again(fake, function):
    function.capabilities[0] = [(1, b"")]
    assert "cannot be read" in str(await refused(fake))
    function.capabilities.clear()
    function.get_irq_info = lambda _view: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    error = await refused(fake)
    assert "does not describe the function" in str(error)
    assert function.calls[-1] == "released"


@trio_test
async def test_two_functions_side_by_side(by_cdev, machine):
    other = FakeFunction("0000:00:05.0", group=8)
    machine.function("0000:00:05.0", group=8, cdev="vfio1")
    machine.cdev_nodes("vfio1")
    by_cdev.functions[other.bdf] = by_cdev.cdevs["vfio1"] = other
    first = await open_bdf(BDF, kernel=by_cdev.kernel)
    second = await open_bdf("0000:00:05.0", kernel=by_cdev.kernel)
    first.write(0, 0x10, 4, 0x11111111)
    second.write(0, 0x10, 4, 0x22222222)
    assert (first.read(0, 0x10, 4), second.read(0, 0x10, 4)) == (0x11111111, 0x22222222)
    await first.aclose()
    assert second.read(0, 0x10, 4) == 0x22222222
    await second.aclose()


# --- mediated devices


UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture(params=["group", "cdev"])
def mediated(machine, no_leaks, request):
    """A kernel with one mediated device, which has an IOMMU group of no IOMMU and no ids in sysfs."""
    function = FakeFunction(UUID)
    function.sizes[7] = 0xFF
    machine.mdev(UUID, "mtty-2", driver="mtty", cdev="vfio3")
    machine.nodes("/dev/vfio/vfio", "/dev/vfio/7")
    fake = FakeKernel(machine.root, function)
    if request.param == "cdev":
        machine.cdev_nodes("vfio3")
        fake.cdevs["vfio3"] = function
    fake.has_hwpt = False  # there is no IOMMU before it
    fake.way = Way(request.param)
    yield fake
    fake.close()


@trio_test
async def test_mediated_device(mediated):
    host = await open_mdev(UUID, kernel=mediated.kernel)
    assert (host.name, host.attachment.way, host.can_reset) == (UUID, mediated.way, True)
    assert (host.function.mdev_type, host.function.driver, host.migration) == ("mtty-2", "mtty", None)
    assert (host.regions[7].size, host.identity().vendor) == (0xFF, 0x1234)
    await host.aclose()


@pytest.mark.parametrize("told", [False, True])
@trio_test
async def test_reset_of_a_mediated_device_that_does_not_say_that_it_has_one(mediated, told):
    function = mediated.functions[UUID]
    function.tells_reset, function.resets = told, True
    host = await open_mdev(UUID, kernel=mediated.kernel)
    assert (host.can_reset, function.calls.count("reset")) == (True, 0 if told else 1)
    assert await host.reset() == "DEVICE_RESET"
    await host.aclose()
    function.resets = function.tells_reset = False
    host = await open_mdev(UUID, kernel=mediated.kernel)
    assert not host.can_reset
    await host.aclose()


@trio_test
async def test_mediated_devices_that_cannot_be_opened(machine, mediated):
    other = UUID.replace("8", "9")
    with pytest.raises(HostError, match=f"no mediated device {other}") as failed:
        await open_mdev(other, kernel=mediated.kernel)
    assert failed.value.errno == errno.ENODEV
    assert "mdev_supported_types" in "".join(failed.value.__notes__)
    machine.mdev(other, "mtty-1", driver="", group=9)
    with pytest.raises(HostError, match=r"\(mtty-1\) has no driver"):
        await open_mdev(other, kernel=mediated.kernel)
    third = UUID.replace("8", "7")
    machine.mdev(third, "mtty-1", driver="mtty", group=10)
    with pytest.raises(HostError, match=r"missing: /dev/vfio/10"):
        await open_mdev(third, kernel=mediated.kernel)
