"""Owns the other ends of the machine's wires: on each virtio interface, frames are answered where they came from.

One station for all of them, as behind a switch: it knows which numbers it has seen, whichever wire they came by.
"""

import os
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from e1000e.wire import PROTOCOL, Station

NET = Path("/sys/class/net")
QUEUED = 1 << 20


def interfaces() -> list[str]:
    """The names of the machine's virtio interfaces, up."""
    subprocess.run(["modprobe", "-q", "virtio_net"], check=False)
    found = sorted(path.name for path in NET.iterdir() if _driver(path) == "virtio_net")
    for name in found:
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    return found


def _driver(path: Path) -> str:
    link = path / "device" / "driver"
    return os.path.basename(os.readlink(link)) if link.is_symlink() else ""


@contextmanager
def station() -> Iterator[Station]:
    """One that answers on all wires until the end of the `with`."""
    made = Station()
    with ExitStack() as stack:
        links = [stack.enter_context(_link(name)) for name in interfaces()]
        end, ended = socket.socketpair()
        stack.enter_context(ended)
        thread = threading.Thread(target=_answer, args=(links, ended, made))
        thread.start()
        try:
            yield made
        finally:
            end.close()
            thread.join()


def _link(name: str) -> socket.socket:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(PROTOCOL))
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUED)
    link.bind((name, PROTOCOL))
    return link


def _answer(links: list[socket.socket], ended: socket.socket, made: Station) -> None:
    while ended not in (ready := select.select([*links, ended], [], [])[0]):
        for link in ready:
            frame, address = link.recvfrom(1 << 16)
            if address[2] != socket.PACKET_OUTGOING:
                for answer in made.hears(frame):
                    link.send(answer)
