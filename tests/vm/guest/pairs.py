"""Owns two pairs of PF and VF in the test machine, each pair with a server for its VF: a source and a destination.

Functions are found by their ids; the n-th PF belongs to the n-th VF, since each model's are plugged in next to each
other. Must not know a vendor's registers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.server.programs import Server
from tests.vm.guest import pci
from tests.vm.guest.checks import equal
from tests.vm.guest.served import SECONDS, connect, serve
from vfu_server.testing import Guest, GuestMemory

Ids = tuple[int, int]


class Pairs:
    """The servers, started when they are first wanted: under emulation a start takes seconds."""

    def __init__(self, plugin: str, vf: Ids, pf: Ids, *options: str, arguments: Sequence[str] = ()) -> None:
        """`options` are the plugin's, `arguments` the server's."""
        self._plugin = plugin
        self._arguments = arguments
        self._vf, self._pf = vf, pf
        self._options = [word for option in options for word in ("--option", option)]
        self.running: dict[str, Server] = {}

    def servers(self) -> list[str]:
        """The addresses of both VFs, each served with its PF."""
        found = list(zip(pci.find(self._vf), pci.find(self._pf), strict=True))
        equal(len(found), 2, "pairs of functions")
        for vf, pf in found:
            if vf not in self.running:
                for bdf in (vf, pf):
                    pci.bind(bdf)
                self.running[vf] = serve(
                    vf, "--option", f"pf={pf}", *self._options, *self._arguments, plugin=self._plugin
                )
        return [vf for vf, _ in found]

    @contextmanager
    def guests(self, size: int, iova: int) -> Iterator[tuple[Guest, Guest]]:
        """A guest that has started, and one that waits for it to arrive, each with memory of its own."""
        source, destination = self.servers()
        with (
            GuestMemory.of(size, iova) as memory,
            GuestMemory.of(size, iova) as other,
            connect(source, memory) as here,
        ):
            here.start()
            # Not before: a server gives a connection that says nothing some seconds, which such a start may take here.
            with connect(destination, other) as there:
                there.plug_in()
                there.machine_reset()
                yield here, there

    def give_up(self) -> str:
        """Kill the servers; their logs."""
        logs = ""
        while self.running:
            bdf, server = self.running.popitem()
            server.process.kill()
            server.wait(SECONDS)
            logs += f"the log of {bdf}'s server:\n{server.log}"
        return logs

    def end(self) -> dict[str, str]:
        """End the servers as an operator does, and look that they end well; their logs by VF."""
        logs = {}
        while self.running:
            bdf, server = self.running.popitem()
            code, _ = server.end(seconds=SECONDS)
            equal((code, "Traceback" in server.log), (0, False), f"{bdf}: {server.log}")
            logs[bdf] = server.log
        return logs
