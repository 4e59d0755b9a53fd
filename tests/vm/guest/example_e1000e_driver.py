"""Checks in the test machine that the kernel's own e1000e has its cards back after our server had them: by group only,
since the kernel of the other machines has no such driver.
"""

import socket
import subprocess
import time
from pathlib import Path

from e1000e.traffic import Traffic
from e1000e.wire import HEADER, PROTOCOL, TURNED, frame_of

from tests.vm.guest import checks, functions, pci, stations, wired
from tests.vm.guest.checks import equal
from tests.vm.guest.served import SECONDS
from tests.vm.guest.wired import guests, traffic_of
from vfu_server.testing import migrate_guest

FRAMES = 32
FIRST = 1 << 32
"""Numbers of these frames, that no guest has sent."""
EVERYBODY = b"\xff" * 6


def use(traffic: Traffic) -> None:
    traffic.exchange(FRAMES)
    traffic.write("MTA[3].word", 0xFFFFFFFF)


def check_our_server_has_them_first() -> None:
    with stations.station(), guests() as (here, there):
        traffic = traffic_of(here, "msix")
        use(traffic)
        migrate_guest(here, there)
        traffic.move(there)
        use(traffic)
    wired.end()


def check_the_kernels_driver_has_them_again() -> None:
    for number, bdf in enumerate(pci.find(pci.E1000E)):
        pci.bind(bdf, "e1000e")
        name = functions.interface(bdf)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        wait_for_link(name)
        with stations.station() as station:
            there_and_back(name, FIRST * (number + 1))
            equal(sorted(station.seen.values()), [1] * FRAMES, "frames at the other end, each once")


def wait_for_link(name: str) -> None:
    carrier, deadline = Path(f"/sys/class/net/{name}/carrier"), time.monotonic() + SECONDS
    while carrier.read_text().strip() != "1":
        if time.monotonic() > deadline:
            raise AssertionError(f"{name}: no link after {SECONDS:g} s")


def there_and_back(name: str, first: int) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(PROTOCOL)) as link:
        link.bind((name, PROTOCOL))
        link.settimeout(SECONDS)
        ours = link.getsockname()[4]
        for number in range(first, first + FRAMES):
            frame = frame_of(EVERYBODY, ours, number.to_bytes(8, "big") + bytes(range(200)))
            link.send(frame)
            equal(answer(link), ours + frame[HEADER:].translate(TURNED), f"the answer to {number:#x}")


def answer(link: socket.socket) -> bytes:
    """Whom it is for, and what it says; what we sent is seen as well."""
    while True:
        frame, address = link.recvfrom(1 << 16)
        if address[2] != socket.PACKET_OUTGOING:
            return frame[:6] + frame[HEADER:]


checks.run(globals(), wired.give_up)
