"""The devices of this process with their present clients: where their BARs are, as one guest sees them.

Devices whose clients are the same process belong to one machine, so a DMA map below one's BAR is peer memory for the
other. It must not know sessions or what a map means.
"""

import contextlib
import socket
import struct

from vfu_server import dma
from vfu_server.dma import BarPlacement
from vfu_server.errors import HostError
from vfu_server.host_device import HostDevice
from vfu_server.pciconfig import HEADER_SIZE
from vfu_server.uapi import RegionIndex

_CREDENTIALS = struct.Struct("=iII")
"""struct ucred: pid, uid, gid."""


class Peers:
    """Who is served, by the device's name. One for all sessions of a process."""

    def __init__(self) -> None:
        self._served: dict[str, tuple[int, HostDevice]] = {}

    def connect(self, name: str, host: HostDevice, client: int) -> None:
        """Device `name` has a client, process number `client` (0: not known)."""
        self._served[name] = (client, host)

    def disconnect(self, name: str) -> None:
        """Its client has gone."""
        self._served.pop(name, None)

    def bars(self, name: str, host: HostDevice) -> tuple[BarPlacement, ...]:
        """Where the guest of device `name` has put its BARs and those of the other devices that it has from here."""
        client = self._served.get(name, (0, host))[0]
        found = list(_placements(name, host))
        for other, (its_client, its_host) in self._served.items():
            if other != name and client and its_client == client:
                with contextlib.suppress(HostError):  # one that is gone decodes nothing
                    found += _placements(other, its_host)
        return tuple(found)


def _placements(name: str, host: HostDevice) -> tuple[BarPlacement, ...]:
    # BARs are in the header; a mediated device need not have all of the 256 bytes behind it (mtty has 255).
    header = host.read_block(RegionIndex.CONFIG, 0, HEADER_SIZE)
    return dma.bar_placements(name, header, host.regions)


def client_process(sock_fd: int) -> int:
    """The number of the process that connected the UNIX socket; 0 if the kernel does not say."""
    with socket.socket(fileno=socket.dup(sock_fd)) as sock, contextlib.suppress(OSError):
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(data)[0])
    return 0
