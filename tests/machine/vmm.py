"""A VMM with two functions of one server that write into each other's BARs, all in real processes.

Like QEMU it keeps no memory behind a peer's BAR: what a device writes there comes as a message, and goes on to the
other device as a register write.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from tests.plugins_synthetic.peer_model import (
    INBOX,
    REG_CONTROL,
    REG_LAST,
    REG_MISSING,
    REG_SENT,
    REG_TARGET,
    SEND,
)
from tests.plugins_synthetic.peer_plugin import install_peer
from tests.server.programs import Server
from vfu_server.testing import Client
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, MigState, RegionIndex

SECONDS = 60.0
BARS = {"a": 0xE000_0000, "b": 0xE000_1000}
OTHER = {"a": "b", "b": "a"}


@contextlib.contextmanager
def server(folder: Path, name: str, machine: str = "guest", **p2p: bool) -> Iterator[Server]:
    """A server of devices a and b; `p2p` by device."""
    site = folder / "site"
    if not site.exists():
        install_peer(site)
    lines = ["[defaults]", 'plugin = "peer"', f'socket-path = "{folder}/{name}-%n.sock"']
    lines += [f'machine = "{machine}"'] if machine else []
    for device in BARS:
        lines += ["[[device]]", f'name = "{device}"', 'model = "peer"', "[device.options]"]
        lines += [f"p2p = {str(p2p.get(device, True)).lower()}"]
    config = folder / f"{name}.toml"
    config.write_text("\n".join(lines))
    with Server("--config", config, sites=[site], TMPDIR=str(folder)) as running:
        for device in BARS:
            running.wait_log(f"{device}: listening at", SECONDS)
        running.where = {device: f"{folder}/{name}-{device}.sock" for device in BARS}
        yield running
        assert running.end(seconds=SECONDS)[0] == 0, running.log
        assert "Traceback" not in running.log


class Wire:
    """What is behind a device's messages: the other device's BAR."""

    def __init__(self, vmm: "Vmm", device: str) -> None:
        self._vmm, self._device = vmm, device

    def dma_read(self, iova: int, length: int) -> bytes:
        raise OSError(14, "nobody reads here")

    def dma_write(self, iova: int, data: bytes) -> None:
        peer = OTHER[self._device]
        self._vmm.clients[peer].region_write(0, iova - BARS[peer], data, posted=True)


class Vmm:
    """The two clients."""

    def __init__(self, served: Server) -> None:
        self.clients: dict[str, Client] = {}
        for device, path in served.where.items():
            client = self.clients[device] = Client.connect(path, timeout=SECONDS, memory=Wire(self, device))
            client.negotiate()
            client.dma_map(BARS[OTHER[device]], 0x1000, fd=-1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients.values():
            client.close()

    def begin(self) -> None:
        """Both send to each other."""
        for device, client in self.clients.items():
            client.write(RegionIndex.CONFIG, PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)
            client.write(0, REG_TARGET, 8, BARS[OTHER[device]] + INBOX)
            client.write(0, REG_CONTROL, 4, SEND)

    def read(self, device: str, register: int) -> int:
        return self.clients[device].read(0, register, 8)

    def serve_until(self, holds: Callable[[], bool], what: str) -> None:
        """Carry messages."""
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, what
            for client in self.clients.values():
                client.serve(0.001)

    def serve_more(self, count: int = 20) -> None:
        """Until both have sent so many more."""
        wanted = {device: self.read(device, REG_SENT) + count for device in BARS}
        self.serve_until(
            lambda: all(self.read(device, REG_SENT) >= wanted[device] for device in BARS), "nothing is sent any more"
        )

    def set(self, *states: MigState) -> None:
        """Each of the states in turn, for both devices before the next one, as QEMU does."""
        for state in states:
            for client in self.clients.values():
                client.set_mig_state(state)

    def nothing_is_missing(self) -> None:
        """Both held back: what was sent is what has come in, one by one."""
        self.set(MigState.RUNNING_P2P)
        for device in BARS:
            sent, last = self.read(device, REG_SENT), self.read(OTHER[device], REG_LAST)
            assert sent == last > 0, f"{device} has sent {sent}, {last} came in"
            assert self.read(device, REG_MISSING) == 0, f"{self.read(device, REG_MISSING)} did not come in at {device}"
