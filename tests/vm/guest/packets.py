"""Owns the other end of a network function: frames that come to an interface go back with contents turned over."""

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PROTOCOL = 0x88B5
"""For experiments in one place (IEEE 802)."""
ADDRESSES, HEADER = 12, 14
TURNED = bytes(0xFF - byte for byte in range(256))


@dataclass(slots=True)
class Answers:
    """How many frames were answered."""

    count: int = 0


@contextmanager
def answered(interface: str) -> Iterator[Answers]:
    """Answer every frame of PROTOCOL that comes to the interface, until the end of the `with`."""
    answers, (end, ended) = Answers(), socket.socketpair()
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(PROTOCOL))
    link.bind((interface, PROTOCOL))
    thread = threading.Thread(target=_answer, args=(link, ended, answers))
    thread.start()
    try:
        yield answers
    finally:
        end.close()
        thread.join()
        link.close()
        ended.close()


def _answer(link: socket.socket, ended: socket.socket, answers: Answers) -> None:
    ours = link.getsockname()[4]
    while ended not in select.select([link, ended], [], [])[0]:
        frame, address = link.recvfrom(1 << 16)
        if address[2] != socket.PACKET_OUTGOING:
            body = frame[HEADER:].translate(TURNED)
            link.send(frame[6:ADDRESSES] + ours + frame[ADDRESSES:HEADER] + body)
            answers.count += 1
