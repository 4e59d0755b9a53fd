"""Checks in the test machine of guest memory behind a real IOMMU: `data_plane.py group|cdev`.

Memory of each kind, read-only maps, the host's limit on maps, and DMA from one edu to another, whose file the client
has.
"""

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server.programs import Server, install
from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.raw_vfio import CdevDevice, GroupDevice
from tests.vm.guest.served import IOVA, MEMORY, SECONDS, edu_of, socket_of
from vfu_server.testing import EduDriver, Guest, GuestMemory, ReplyError

DOOR = sys.argv[1]
RAW = {"group": GroupDevice, "cdev": CdevDevice}[DOOR]
BDF, PEER = pci.find(pci.EDU)
HUGE = 2 << 20
AT = 0x800000
PEER_AT = 0x4000000
PAGE = 4096
TEXT = bytes(range(256)) * 8
IDENTIFICATION, LIVENESS = 0x00, 0x04
LIMIT = 64
PARAMETER = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
PLUGIN = """
from plugins.vfio.device import PlainFunction
from plugins.vfio.layout import policy_of
from vfu_server.device import Capabilities
from vfu_server.hookspecs import hookimpl

VFU_SERVER_API = 1


class Reaching(PlainFunction):
    @property
    def capabilities(self):
        return Capabilities(migratable=False, reason="a test's", p2p=True)


@hookimpl
def vfu_server_probe(host, options):
    return Reaching(host, policy_of(host.regions, None), serve_unreset=True)
"""


@contextmanager
def guest_of(*options: object, plugin: str = "vfio", sites: tuple[Path, ...] = ()) -> Iterator[tuple[Guest, Server]]:
    """A guest that has started, of a server for the first edu that ends with it."""
    path = socket_of(BDF)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with Server("--plugin", plugin, "--bdf", BDF, "--socket-path", path, *options, sites=sites) as server:
        server.wait_log("listening at", SECONDS)
        memory = GuestMemory.of(MEMORY, IOVA)
        with memory, Guest.connect(path, memory, timeout=SECONDS) as guest:
            yield guest.start(), server
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), server.log)


def edu_guest(*options: object):
    return guest_of("--option", "without-reset=serve", *options)


def refused(number: int, call, *arguments, **more) -> None:
    try:
        call(*arguments, **more)
    except ReplyError as error:
        equal(errno.errorcode[error.errno], errno.errorcode[number])
    else:
        raise AssertionError(f"{call} was not refused")


def check_bind() -> None:
    for bdf in (BDF, PEER):
        pci.bind(bdf)
    subprocess.run(["sh", "-c", "echo 8 > /proc/sys/vm/nr_hugepages"], check=True)


def files() -> Iterator[tuple[str, int]]:
    """Files of shared memory, two mebibytes each."""
    yield "memfd", os.memfd_create("guest", os.MFD_CLOEXEC)
    yield "shared memory", os.open("/dev/shm/guest", os.O_RDWR | os.O_CREAT)
    yield "memfd of huge pages", os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    folder = Path("/tmp/huge")
    folder.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", folder], check=True)
    yield "hugetlbfs", os.open(folder / "guest", os.O_RDWR | os.O_CREAT)


def check_memory_of_each_kind() -> None:
    with edu_guest() as (guest, _):
        edu = edu_of(guest)
        for kind, fd in files():
            os.ftruncate(fd, HUGE)
            with mmap.mmap(fd, HUGE) as memory:
                memory[PAGE : PAGE + len(TEXT)] = TEXT
                guest.client.dma_map(AT, HUGE, fd=fd)
                edu.copy_to_device(AT + PAGE, len(TEXT))
                edu.copy_from_device(AT + HUGE - PAGE, len(TEXT))
                equal(memory[HUGE - PAGE : HUGE - PAGE + len(TEXT)], TEXT, f"by DMA through {kind}")
                guest.client.dma_unmap(AT, HUGE)
            os.close(fd)


def check_read_only_maps() -> None:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.write(fd, TEXT.ljust(2 * PAGE, b"\0"))
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with edu_guest() as (guest, _):
        edu = edu_of(guest)
        refused(errno.EACCES, guest.client.dma_map, AT, 2 * PAGE, fd=read_only)
        guest.client.dma_map(AT, 2 * PAGE, prot=1, fd=read_only)
        edu.copy_to_device(AT, len(TEXT))
        log = KernelLog()
        edu.copy_from_device(AT + PAGE, len(TEXT))
        log.wait(rf"DMAR:.*DMA Write.*{BDF[5:]}.*fault addr {AT + PAGE:#x}")
        log.close()
        equal(os.pread(fd, PAGE, PAGE), bytes(PAGE), "what may only be read")
        edu.copy_from_device(IOVA, len(TEXT))
        equal(guest.memory.read(IOVA, len(TEXT)), TEXT, "what the device has read")
    os.close(fd)
    os.close(read_only)


def check_the_hosts_limit_on_maps() -> None:
    """Page by page, as for a guest with an IOMMU. An iommufd has no such limit: there all of them are taken."""
    before = PARAMETER.read_text() if PARAMETER.exists() else ""
    if DOOR == "group":
        PARAMETER.write_text(str(LIMIT))
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * LIMIT * PAGE)
    try:
        with edu_guest() as (guest, server):
            for n in range(LIMIT - 1):  # one is the guest's own
                guest.client.dma_map(AT + 2 * n * PAGE, PAGE, fd=fd, fd_offset=n * PAGE)
            if DOOR == "group":
                refused(errno.ENOSPC, guest.client.dma_map, PEER_AT, PAGE, fd=fd)
                server.wait_log("the host's limit on the number of maps is reached", SECONDS)
                guest.client.dma_unmap(AT + 4 * PAGE, PAGE)
            guest.client.dma_map(PEER_AT, PAGE, fd=fd)
            edu = edu_of(guest)
            os.pwrite(fd, TEXT, 0)
            edu.copy_to_device(PEER_AT, len(TEXT))
            guest.client.dma_unmap(0, 1 << 39)  # coarsely
            guest.memory.map_into(guest.client)
            edu.copy_from_device(IOVA, len(TEXT))
            equal(guest.memory.read(IOVA, len(TEXT)), TEXT, "by DMA after the limit")
    finally:
        if before:
            PARAMETER.write_text(before)
        os.close(fd)


def reach(edu: EduDriver, guest: Guest) -> int:
    """The peer's identification, as the device reads it."""
    guest.memory.write(IOVA, b"\xee" * 4)
    edu.copy_to_device(PEER_AT + IDENTIFICATION, 4)
    edu.copy_from_device(IOVA, 4)
    return int.from_bytes(guest.memory.read(IOVA, 4), "little")


def check_a_peers_memory_faults_without_leave() -> None:
    with RAW(PEER) as peer, edu_guest() as (guest, server):
        peer.enable()
        guest.client.dma_map(PEER_AT, PAGE, fd=peer.fd, fd_offset=peer.region(0)[1])
        server.wait_log("memory of another device, accepted and not mapped", SECONDS)
        log = KernelLog()
        reach(edu_of(guest), guest)
        log.wait(rf"DMAR:.*DMA Read.*{BDF[5:]}.*fault addr {PEER_AT:#x}")
        log.close()


def check_a_peers_memory_is_reached_with_leave() -> None:
    site = install(Path("/tmp/site"), "reaching", {"reaching": PLUGIN})
    with RAW(PEER) as peer, guest_of("--allow-p2p", plugin="reaching", sites=(site,)) as (guest, server):
        peer.enable()
        wanted = {"fd": peer.fd, "fd_offset": peer.region(0)[1]}
        if DOOR == "cdev":
            refused(errno.EFAULT, guest.client.dma_map, PEER_AT, PAGE, **wanted)
            server.wait_log("an iommufd cannot, a type1 container can", SECONDS)
            return
        guest.client.dma_map(PEER_AT, PAGE, **wanted)
        edu = edu_of(guest)
        equal(reach(edu, guest), 0x010000ED, "the peer's identification, read by the device")
        guest.memory.write(IOVA, (0x12345678).to_bytes(4, "little"))
        edu.copy_to_device(IOVA, 4)
        edu.copy_from_device(PEER_AT + LIVENESS, 4)
        equal(peer.read(0, LIVENESS, 4), 0xEDCBA987, "the peer's answer to what the device wrote")
        guest.client.dma_unmap(PEER_AT, PAGE)
        log = KernelLog()
        reach(edu, guest)
        log.wait(rf"DMAR:.*DMA Read.*{BDF[5:]}.*fault addr {PEER_AT:#x}")
        log.close()


checks.run(globals())
