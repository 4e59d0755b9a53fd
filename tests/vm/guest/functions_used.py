"""Checks in the test machine that functions presented by the plugin vfio can be used: `functions_used.py`.

An nvme by queues built by hand, with its doorbells mapped and by messages, and a virtual function of igb, whose card's
driver answers it. Both are reset. The server's way into VFIO is the one that the kernel has.
"""

import hashlib
import random
import select
from collections.abc import Iterator
from contextlib import contextmanager

from tests.server.programs import run
from tests.vm.guest import checks, functions, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.igbvf_driver import QUEUE_ENABLED, RECEIVE_QUEUE, IgbvfDriver
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.nvme_driver import DOORBELLS, PAGE, VERSION, NvmeDriver
from tests.vm.guest.served import IOVA, MEMORY, SECONDS, serve, socket_of
from vfu_server.testing import Guest, GuestMemory

UNMAPPED = 0x7654000
BLOCKS = (0, 8, 1000)


@contextmanager
def guest_of(bdf: str, *, mapped: bool) -> Iterator[Guest]:
    """A guest that has started, of a server for the function that ends with it."""
    mode = "all" if mapped else "never"
    with serve(bdf, "--mmap", mode, plugin="vfio") as server:
        memory = GuestMemory.of(MEMORY, IOVA)
        with memory, Guest.connect(socket_of(bdf), memory, timeout=SECONDS) as guest:
            yield guest.start()
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), server.log)


def nvme_works(guest: Guest, seed: int) -> None:
    """Identified, and pages written, read back in another order and compared."""
    guest.enable_msix(2)
    driver = NvmeDriver(guest, IOVA, SECONDS)
    driver.start()
    page = driver.identify()
    equal(int.from_bytes(page[:2], "little"), pci.NVME[0], "vendor in the controller's own words")
    equal(page[4:24].rstrip(), b"vm0x11", "serial number")
    driver.create_queues()
    chance = random.Random(seed)
    written = {block: chance.randbytes(PAGE) for block in BLOCKS}
    for block, data in written.items():
        driver.write_page(block, data)
    for block in reversed(BLOCKS):
        read = hashlib.sha256(driver.read_page(block)).hexdigest()
        equal(read, hashlib.sha256(written[block]).hexdigest(), f"sha256 of the page at block {block}")


def check_auto_takes_neither() -> None:
    bdf = functions.ready(pci.NVME)
    done = run("--bdf", bdf, "--socket-path", "/run/nvme.sock")
    equal((done.returncode != 0, "Traceback" in done.stderr), (True, False), done.stderr)
    equal("no installed plugin takes" in done.stderr, True, done.stderr)


def check_nvme_by_messages() -> None:
    with guest_of(functions.ready(pci.NVME), mapped=False) as guest:
        equal([region.areas for region in guest.regions.values() if region.areas], [], "areas to map")
        nvme_works(guest, 1)


def check_nvme_by_mapped_doorbells() -> None:
    with guest_of(functions.ready(pci.NVME), mapped=True) as guest:
        areas = guest.regions[0].areas
        inside = [area for area in areas if area.offset <= DOORBELLS < area.offset + area.size]
        equal(len(inside), 1, f"areas with the doorbells, of {areas}")
        nvme_works(guest, 2)


def check_nvme_is_reset() -> None:
    with guest_of(functions.ready(pci.NVME), mapped=True) as guest:
        guest.enable_msix(2)
        driver = NvmeDriver(guest, IOVA, SECONDS)
        driver.start()
        equal(driver.ready, 1, "ready before the reset")
        guest.client.reset()
        guest.firmware()
        equal(driver.ready, 0, "ready after the reset")
        equal(guest.read(0, VERSION, 4) >> 16, 1, "major version")
        nvme_works(guest, 3)


def check_nvme_at_unmapped_memory_faults_in_the_iommu() -> None:
    bdf = functions.ready(pci.NVME)
    with guest_of(bdf, mapped=True) as guest:
        guest.enable_msix(2)
        driver = NvmeDriver(guest, IOVA, SECONDS)
        driver.start()
        log = KernelLog()
        driver.data = UNMAPPED
        guest.memory.write(IOVA, bytes(PAGE))
        try:
            guest.memory.add(UNMAPPED, PAGE)  # there for us, and for nobody else
            driver.identify()
        except AssertionError:
            pass  # the controller may also tell the error in the completion
        log.wait(rf"DMAR:.*DMA Write.*{bdf[5:]}.*fault addr {UNMAPPED:#x}")
        log.close()
        equal(guest.memory.read(UNMAPPED, PAGE), bytes(PAGE), "memory that was not mapped")


def check_virtual_function_talks_to_its_card() -> None:
    bdf = functions.virtual_functions()[0]
    for mapped in (True, False):
        with guest_of(bdf, mapped=mapped) as guest:
            equal(guest.config.read(0, 4), 0x10CA8086, "vendor and device, which a virtual function does not have")
            address = IgbvfDriver(guest, SECONDS).hello()
            equal(address, functions.ADDRESS, "the hardware address that the card's driver was given for it")


def check_interrupts_of_a_virtual_function() -> None:
    with guest_of(functions.virtual_functions()[0], mapped=True) as guest:
        interrupts = guest.enable_msix(3)
        driver = IgbvfDriver(guest, SECONDS)
        driver.mailbox_interrupt(1)
        driver.hello()
        # QEMU's card takes the number of the mailbox's vector for a mask, so this may be another vector than ours.
        equal(len(select.select(interrupts.fds, [], [], SECONDS)[0]) > 0, True, "the card's answer came with a message")
    with guest_of(functions.virtual_functions()[0], mapped=True) as guest:
        interrupts = guest.enable_msix(3)
        driver = IgbvfDriver(guest, SECONDS)
        for vector in range(3):
            equal(interrupts.counts()[vector:], (0,) * (3 - vector), "messages before")
            driver.fire(vector)
            equal(interrupts.wait(vector, SECONDS), 1, f"messages of vector {vector}")


def check_virtual_function_is_reset() -> None:
    with guest_of(functions.virtual_functions()[0], mapped=True) as guest:
        driver = IgbvfDriver(guest, SECONDS)
        driver.write(RECEIVE_QUEUE, QUEUE_ENABLED)
        equal(driver.read(RECEIVE_QUEUE) & QUEUE_ENABLED, QUEUE_ENABLED, "the queue before the reset")
        guest.client.reset()
        guest.firmware()
        equal(driver.read(RECEIVE_QUEUE) & QUEUE_ENABLED, 0, "the queue after the reset")
        equal(len(driver.hello()), 6, "address")


checks.run(globals())
