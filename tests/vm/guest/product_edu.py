"""Checks in the test machine that the server presents edu from kernel VFIO: `product_edu.py group|cdev [model]`.

The way in is the one that the kernel has. With `model` the device is ours, plugged in from outside with vfio-user-pci.
"""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.server.programs import Server, run
from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.served import IOVA, MEMORY, SECONDS, connect, edu_of, serve, socket_of
from vfu_server.testing import ConnectionClosedError, Guest, GuestMemory, Interrupts
from vfu_server.testing.edu import BUFFER, BUFFER_SIZE, DMA_FROM_DEVICE
from vfu_server.uapi import PCI_COMMAND, IrqIndex, RegionIndex

BDF = pci.only(pci.EDU)
DOOR, MODEL = sys.argv[1], "model" in sys.argv
PATTERN = bytes(range(255, -1, -1)) * (BUFFER_SIZE // 256)
UNMAPPED = 0x7654000

running: list[Server] = []
"""The server that most checks share: under emulation a start takes seconds."""


def server() -> Server:
    if not running:
        running.append(serve(BDF))
    return running[0]


def give_up() -> str:
    """End the shared server, which would keep the function from being unbound; its log."""
    if not running:
        return ""
    broken = running.pop()
    broken.process.kill()
    broken.wait(SECONDS)
    return f"the server's log:\n{broken.log}"


def started() -> Guest:
    """A new client of the shared server, as far as an operating system would find it."""
    server()
    guest = connect(BDF)
    try:
        return guest.start()
    except BaseException:
        guest.close()
        raise


def wait_fault(log: KernelLog, kind: str, address: int) -> None:
    """The IOMMU's driver told of the access. A device from outside has no mapping that it could be made through."""
    if not MODEL:
        log.wait(rf"DMAR:.*DMA {kind}.*{BDF[5:]}.*fault addr {address:#x}")


def healthy(guest: Guest) -> None:
    """Registers, interrupts and DMA of a device in use work."""
    edu = edu_of(guest)
    equal(edu.liveness(0x12345678), 0xEDCBA987, "liveness")
    edu.use_msi()
    equal(edu.factorial(6), 720, "6!")
    guest.memory.write(IOVA, PATTERN)
    edu.copy_to_device(IOVA, len(PATTERN))
    edu.copy_from_device(IOVA + len(PATTERN), len(PATTERN))
    equal(guest.memory.read(IOVA + len(PATTERN), len(PATTERN)), PATTERN, "what came back by DMA")


def check_function_without_driver_is_refused() -> None:
    done = run("--plugin", "generic_dmaq", "--bdf", BDF, "--socket-path", "/run/edu.sock")
    equal((done.returncode != 0, "Traceback" in done.stderr), (True, False), done.stderr)
    equal("vfio-pci" in done.stderr and BDF in done.stderr, True, f"the cure is named in {done.stderr!r}")


def check_opens_by_the_way_that_the_kernel_has() -> None:
    pci.bind(BDF)
    equal(pci.group_members(BDF), [BDF], "members of the group")
    opened = {Path(os.readlink(fd)).name for fd in _open_files(server())}
    way = {"group": "vfio", "cdev": "iommu"}[DOOR]
    equal(way in opened, True, f"/dev/.../{way} is among {sorted(opened)}")


def check_config_space_and_registers() -> None:
    with started() as guest:
        equal(guest.config.read(0, 4), 0x11E81234, "vendor and device")
        equal(guest.config.read(8, 4), 0x00FF0010, "class and revision")
        equal([(bar.index, bar.size) for bar in guest.bars], [(0, 1 << 20)], "BARs")
        edu = edu_of(guest)
        equal(edu.liveness(0xA5A5A5A5), 0x5A5A5A5A, "liveness")
        equal(edu.factorial(10), 3628800, "10!")


def check_interrupts_by_message_and_by_pin() -> None:
    with started() as guest:
        edu = edu_of(guest)
        edu.use_msi()
        equal(edu.factorial(5), 120, "5! by MSI")
        edu.use_intx()
        equal(edu.factorial(7), 5040, "7! by INTx")
        equal(edu.factorial(8), 40320, "8! by INTx, which was unmasked")


def check_dma_both_ways() -> None:
    with started() as guest:
        healthy(guest)


def check_unmapped_dma_faults_in_the_iommu() -> None:
    with started() as guest:
        log = KernelLog()
        edu = edu_of(guest)
        edu.begin_dma(BUFFER, UNMAPPED, BUFFER_SIZE, DMA_FROM_DEVICE)
        edu.finish_dma()
        wait_fault(log, "Write", UNMAPPED)
        edu.begin_dma(UNMAPPED, BUFFER, BUFFER_SIZE, 0)
        edu.finish_dma()
        wait_fault(log, "Read", UNMAPPED)
        log.close()
        healthy(guest)
    equal(server().process.poll(), None, "the server's exit status")


def check_memory_that_was_unmapped_is_out_of_reach() -> None:
    with started() as guest:
        guest.client.dma_unmap(IOVA, MEMORY)
        log = KernelLog()
        edu = edu_of(guest)
        edu.begin_dma(BUFFER, IOVA, BUFFER_SIZE, DMA_FROM_DEVICE)
        edu.finish_dma()
        wait_fault(log, "Write", IOVA)
        log.close()
        equal(guest.memory.read(IOVA, MEMORY), bytes(MEMORY), "memory that was unmapped")
        guest.memory.map_into(guest.client)
        healthy(guest)


def check_killed_client() -> None:
    server()
    memory = GuestMemory.of(MEMORY, IOVA)
    ready, theirs = os.pipe()
    child = os.fork()
    if not child:
        # Its end is the signal; an exception must not let it go on as a second copy of the checks.
        with suppress(BaseException):
            guest = connect(BDF, memory).start()
            edu_of(guest).begin_dma(BUFFER, IOVA, BUFFER_SIZE, DMA_FROM_DEVICE)
            os.write(theirs, b"!")
            signal.pause()
        os._exit(1)
    os.close(theirs)
    equal(os.read(ready, 1), b"!", "the client that began a DMA")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    memory.close()
    server().wait_log("client disconnected", SECONDS)
    with started() as guest:
        healthy(guest)


def check_killed_server() -> None:
    with started() as guest:
        edu_of(guest).begin_dma(BUFFER, IOVA, BUFFER_SIZE, DMA_FROM_DEVICE)
        victim = running.pop()
        victim.process.kill()
        equal(victim.wait(SECONDS), -signal.SIGKILL, "exit status")
        with suppress(ConnectionClosedError):
            guest.client.read(RegionIndex.CONFIG, PCI_COMMAND, 2)
            raise AssertionError("a server that was killed has answered")
    with started() as guest:
        healthy(guest)


def check_unbind_waits_for_the_server_and_tells_it() -> None:
    with started() as guest:
        request = Interrupts(guest.client, IrqIndex.REQ).arm()
        # Writing to `unbind` blocks until the function is closed, so another process does it.
        unbind = subprocess.Popen(["sh", "-c", f"echo {BDF} > /sys/bus/pci/drivers/vfio-pci/unbind"])
        request.wait(0, SECONDS)
        request.close()
        server().wait_log("the kernel wants the function back", SECONDS)
        equal(unbind.poll(), None, "the function is unbound while it is served")
    stopped = running.pop()
    code, _ = stopped.end(seconds=SECONDS)
    equal((code, "Traceback" in stopped.log), (0, False), stopped.log)
    equal(unbind.wait(SECONDS), 0, "exit status of the unbind")
    equal((pci.driver(BDF), socket_of(BDF).exists()), ("", False), "driver and socket")


def check_bound_again() -> None:
    pci.bind(BDF)
    with started() as guest:
        healthy(guest)
    last = running.pop()
    code, _ = last.end(seconds=SECONDS)
    equal(code, 0, last.log)
    told = re.findall(r"Traceback|Z (?:warning|error) .*", last.log)
    # This client never migrates, and is told so.
    equal([line for line in told if "has never asked whether this device migrates" not in line], [], last.log)


def _open_files(process: Server) -> list[Path]:
    return list(Path(f"/proc/{process.process.pid}/fd").iterdir())


checks.run(globals(), give_up)
