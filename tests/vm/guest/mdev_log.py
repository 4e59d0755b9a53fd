"""Checks in the test machine that a driver's own log of DMA is passed on: mtty, a mediated device."""

import errno
from pathlib import Path

from tests.server.programs import Server
from tests.vm.guest import checks
from tests.vm.guest.checks import equal
from tests.vm.guest.served import IOVA, MEMORY, SECONDS, SOCKETS
from vfu_server import uapi
from vfu_server.testing import Client, GuestMemory, ReplyError
from vfu_server.uapi import Feature

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1009"
PAGE = 4096


def check_the_drivers_log_is_used() -> None:
    (parent,) = Path("/sys/class/mdev_bus").iterdir()
    kind = min((parent / "mdev_supported_types").iterdir())
    (kind / "create").write_text(UUID)
    SOCKETS.mkdir(mode=0o700, exist_ok=True)
    path = SOCKETS / "mtty.sock"
    with Server("--plugin", "vfio", "--mdev", UUID, "--socket-path", path) as server:
        server.wait_log("listening at", SECONDS)
        with GuestMemory.of(MEMORY, IOVA) as memory, Client.connect(path, timeout=SECONDS) as client:
            client.negotiate()
            memory.map_into(client)
            equal(client.feature_probe(Feature.DMA_LOGGING_START, uapi.FEATURE_SET), True, "a log is offered")
            for ranges in ([(0, 1 << 32)], []):
                equal(client.dma_logging_start(ranges) >= PAGE, True, "page size")
                refused(client.dma_logging_start, [(0, 1 << 32)])
                for size in (PAGE, 16 * PAGE):
                    equal(any(client.dma_logging_report(IOVA, MEMORY, size)), False, "mtty does no DMA")
                client.dma_unmap(IOVA, MEMORY)
                equal(any(client.dma_logging_report(0, 1 << 31)), False, "nor before the unmap")
                memory.map_into(client)
                client.dma_logging_stop()
                refused(client.dma_logging_report, IOVA, MEMORY)
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), server.log)


def refused(call, *arguments) -> None:
    try:
        call(*arguments)
    except ReplyError as error:
        equal(error.errno, errno.EINVAL)
    else:
        raise AssertionError(f"{call} was not refused")


checks.run(globals())
