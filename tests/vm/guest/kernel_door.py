"""Checks in the test machine of the kernel door by itself, on three functions: `kernel_door.py group|cdev`.

edu has no reset, nvme many vectors, igb large BARs; e1000 is alone behind a bridge without a link, so that the bus can
be reset (QEMU's root ports do not bring their link up again, and the kernel then calls the reset failed). No server
runs.
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from vfu_server import uapi
from vfu_server.errors import HostError
from vfu_server.host.in_kernel import InKernel
from vfu_server.host.ioctl import native_ioctl
from vfu_server.host.kernel import KernelHost, open_bdf
from vfu_server.host.kernel_reset import Ladder
from vfu_server.host_device import DmaMap
from vfu_server.uapi import Feature, IrqIndex, RegionIndex

DOOR = sys.argv[1]
E1000_IDS = (0x8086, 0x100E)
EDU, NVME, IGB, E1000 = (pci.only(ids) for ids in (pci.EDU, pci.NVME, pci.IGB, E1000_IDS))
MIB = 1 << 20
ARM = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER
FIRE = uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER
IN_A_MESSAGE = 8


def with_function(bdf: str, work: Callable[[KernelHost], Awaitable[None]]) -> None:
    """Open the function, do the work, close it."""

    async def opened() -> None:
        host = await open_bdf(bdf)
        try:
            with trio.fail_after(120):
                await work(host)
        finally:
            await host.aclose()

    trio.run(opened)


def doctor(bdf: str) -> dict[str, dict[str, object]]:
    """What the doctor says of a function: by check."""
    command = [sys.executable, "-m", "vfu_server", "doctor", "--bdf", bdf, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    equal("Traceback" in done.stderr, False, done.stderr)
    return {row["name"]: row for row in json.loads(done.stdout)["checks"]}


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    """Fresh ones."""
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
    yield fds
    for fd in fds:
        os.close(fd)


@contextmanager
def memory(size: int) -> Iterator[int]:
    """Guest memory, as an fd."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    yield fd
    os.close(fd)


async def refused(work: Awaitable[object], number: int, what: str) -> None:
    """The kernel's errno comes back."""
    try:
        await work
    except HostError as error:
        equal(errno.errorcode[error.errno], errno.errorcode[number], what)
    else:
        raise AssertionError(f"{what}: nothing was refused")


def check_doctor_of_a_function_without_vfio() -> None:
    pci.unbind(EDU)
    found = doctor(EDU)
    equal({name for name, row in found.items() if row["status"] == "fail"}, {"driver", "permission"}, str(found))
    cure = found["driver"]["cure"]
    for line in cure[cure.index("modprobe vfio-pci") :]:
        subprocess.run(["sh", "-c", line], check=line != "modprobe vfio-pci")
    equal(pci.driver(EDU), "vfio-pci", "the driver after the cure was typed")


def check_doctor_of_functions_on_vfio() -> None:
    for bdf in (EDU, NVME, IGB):
        pci.bind(bdf)
        found = doctor(bdf)
        equal(found["open"]["text"].startswith(f"opened by its {DOOR}"), True, found["open"]["text"])
        equal(found["reset"]["status"], "warn" if bdf == EDU else "ok", bdf)
        equal(found["dirty-pages"]["status"], "warn", bdf)
        equal(found["plugin"]["status"], "ok" if bdf == EDU else "fail", bdf)
    equal(doctor(EDU)["migration"]["status"], "ok")


def check_what_the_functions_are() -> None:
    async def work(host: KernelHost) -> None:
        header, space, bars = as_sysfs_has_it(host.name)
        config = host.read_block(RegionIndex.CONFIG, 0, 64)
        equal(config[:4] + config[8:12], header[:4] + header[8:12], "ids and class")
        identity = host.identity()
        equal((identity.vendor, identity.device), (host.function.vendor, host.function.device), "ids")
        equal([region.size for region in host.regions[:6]], bars, "BAR sizes")
        equal(host.regions[RegionIndex.CONFIG].size, space, "config space")

    for bdf in (EDU, NVME, IGB):
        with_function(bdf, work)


def as_sysfs_has_it(bdf: str) -> tuple[bytes, int, list[int]]:
    """The header and size of its config space, and the sizes of its six BARs."""
    folder = pci.DEVICES / bdf
    lines = [[int(word, 16) for word in line.split()] for line in (folder / "resource").read_text().splitlines()]
    bars = [last - first + 1 if flags else 0 for first, last, flags in lines[:6]]
    with (folder / "config").open("rb") as config:
        return config.read(64), (folder / "config").stat().st_size, bars


def check_interrupts() -> None:
    async def work(host: KernelHost) -> None:
        for index in (IrqIndex.MSI, IrqIndex.MSIX):
            count = host.irqs[index].count
            if not count:
                await refused(host.set_irqs(index, FIRE, 0, 0), errno.EINVAL, f"{index!r} that is not there")
                continue
            with eventfds(count) as fds:
                for start in range(0, count, IN_A_MESSAGE):
                    some = fds[start : start + IN_A_MESSAGE]
                    await host.set_irqs(index, ARM, start, len(some), fds=some)
                await host.set_irqs(index, FIRE, 0, count)
                equal([os.eventfd_read(fd) for fd in fds], [1] * count, f"{host.name} {index!r}")
                await host.set_irqs(index, FIRE, 0, 0)

    for bdf in (EDU, NVME, IGB):
        with_function(bdf, work)


def check_error_and_request_interrupts() -> None:
    async def work(host: KernelHost) -> None:
        for index in (IrqIndex.ERR, IrqIndex.REQ):
            with eventfds(1) as fds:
                await host.set_irqs(index, ARM, 0, 1, fds=fds)
                await host.set_irqs(index, FIRE, 0, 1)
                equal(os.eventfd_read(fds[0]), 1, f"{index!r}")
                ends = os.pipe()
                await refused(host.set_irqs(index, ARM, 0, 1, fds=ends[:1]), errno.EINVAL, "a pipe")
                for end in ends:
                    os.close(end)
                await host.set_irqs(index, FIRE, 0, 1)
                equal(os.eventfd_read(fds[0]), 1, f"{index!r}, still armed")

    with_function(NVME, work)


def check_guest_memory() -> None:
    async def work(host: KernelHost) -> None:
        with memory(64 * MIB) as guest:
            await host.dma_map(DmaMap(0, 32 * MIB, 3, guest))
            await host.dma_map(DmaMap(32 * MIB, 32 * MIB, 3, guest, 32 * MIB))
            await host.dma_map(DmaMap(0xFEBF9000, 4096, 3))
            for dma_map, number in (
                (DmaMap(4096, 4096, 3, guest), errno.EEXIST),
                (DmaMap(0xFEE00000, 4096, 3, guest), errno.EINVAL),
                (DmaMap(1 << 32, 4096, 3, guest, 64 * MIB), errno.EFAULT),
            ):
                await refused(host.dma_map(dma_map), number, f"{dma_map}")
            read_only = os.open(f"/proc/self/fd/{guest}", os.O_RDONLY)
            await refused(host.dma_map(DmaMap(1 << 32, 4096, 3, read_only)), errno.EACCES, "a read-only file")
            await host.dma_map(DmaMap(1 << 32, 4096, 1, read_only))
            os.close(read_only)
            equal(host.statistics().dma_maps, 4, "maps")
            os.ftruncate(guest, 0)  # what the device reaches is not ours to lose
            await host.dma_unmap(0, 32 * MIB)
        await host.dma_unmap_all()
        equal(host.statistics().dma_bytes, 0, "bytes")

    for bdf in (EDU, IGB):
        with_function(bdf, work)


def check_scratch_memory() -> None:
    async def work(host: KernelHost) -> None:
        with memory(512 * MIB) as guest:
            await host.dma_map(DmaMap(0, 512 * MIB, 3, guest))
            before = host.native.dma_maps()
            for limit in (1 << 28, 1 << 64):  # the first lies inside the guest's memory
                async with host.scratch(8192, limit) as scratch:
                    equal((scratch.iova + 8192 <= limit, len(scratch.memory)), (True, 8192))
                    scratch.memory[:] = bytes(8192)
            equal([(m.iova, m.size) for m in host.native.dma_maps()], [(m.iova, m.size) for m in before])

    with_function(EDU, work)


def check_resets() -> None:
    async def of_the_function(host: KernelHost) -> None:
        equal(await host.reset(), "DEVICE_RESET")

    async def of_the_bus(host: KernelHost) -> None:
        ladder = Ladder(native_ioctl, host.name, host.attachment, set(), InKernel(host.name), by_function=False)
        equal((ladder.exists(), await ladder.reset()), (True, "PCI_HOT_RESET"))
        equal(host.identity().vendor, E1000_IDS[0])

    async def none(host: KernelHost) -> None:
        equal(host.can_reset, False)
        await refused(host.reset(), errno.ENODEV, "edu")

    with_function(NVME, of_the_function)
    with_function(IGB, of_the_function)
    with_function(EDU, none)
    pci.bind(E1000)
    equal(len(pci.group_members(E1000)), 2, "the bridge and what is behind it are one group")
    with_function(E1000, of_the_bus)


def check_features_that_plain_vfio_pci_has_not() -> None:
    async def work(host: KernelHost) -> None:
        for feature in (Feature.MIGRATION, Feature.MIG_DEVICE_STATE, Feature.DMA_LOGGING_START):
            await refused(host.device_feature(uapi.FEATURE_PROBE | feature), errno.ENOTTY, feature.name)
        equal(await host.device_feature(uapi.FEATURE_PROBE | uapi.FEATURE_SET | Feature.LOW_POWER_EXIT), b"")

    with_function(EDU, work)


def check_only_one_has_it() -> None:
    async def work(host: KernelHost) -> None:
        await refused(open_bdf(host.name), errno.EBUSY if DOOR == "group" else errno.EINVAL, "a second open")
        equal(host.identity().vendor, pci.EDU[0])

    with_function(EDU, work)
    equal(doctor(EDU)["open"]["status"], "ok", "after it was closed")


checks.run(globals())
