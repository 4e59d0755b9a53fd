"""Owns QEMU's qtest channel as tests use it: accesses of memory, ports and PCI config space, and the virtual clock.

The machine is a q35 without a processor: nothing runs but what the channel asks for, and time stands still between two
steps of the clock.
"""

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tools.qemu_root import QemuRoot

_LETTERS = {1: "b", 2: "w", 4: "l", 8: "q"}
_SECONDS = 20.0


class Qtest:
    """One running machine. All calls wait for the answer; RuntimeError with QEMU's words if it is not OK."""

    def __init__(self, channel: socket.socket, monitor: socket.socket | None, process: subprocess.Popen[bytes]) -> None:
        """Without `monitor`, somebody else speaks QMP to this machine."""
        self.process = process
        self._channel = channel.makefile("rw", encoding="ascii", newline="\n")
        self._monitor = monitor.makefile("rw", encoding="utf-8", newline="\n") if monitor else None
        if self._monitor:
            self._monitor.readline()
            self.execute("qmp_capabilities")

    def ask(self, line: str) -> list[str]:
        """Send one command; the words of the answer behind OK."""
        self._channel.write(line + "\n")
        self._channel.flush()
        while True:
            words = self._channel.readline().split()
            if not words:
                raise RuntimeError(f"QEMU went away at {line!r}")
            if words[0] == "OK":
                return words[1:]
            if words[0] != "IRQ":
                raise RuntimeError(f"{line!r}: {' '.join(words)}")

    def read(self, address: int, width: int) -> int:
        """One read of physical memory."""
        return int(self.ask(f"read{_LETTERS[width]} {address:#x}")[0], 16)

    def write(self, address: int, width: int, value: int) -> None:
        """One write to physical memory."""
        self.ask(f"write{_LETTERS[width]} {address:#x} {value:#x}")

    def load(self, address: int, length: int) -> bytes:
        """Bytes of memory."""
        return bytes.fromhex(self.ask(f"read {address:#x} {length:#x}")[0][2:])

    def store(self, address: int, data: bytes) -> None:
        """Put bytes into memory."""
        self.ask(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    def clock_step(self, nanoseconds: int) -> None:
        """Let the virtual clock go on, and run the timers that are due."""
        self.ask(f"clock_step {nanoseconds}")

    def config_read(self, slot: int, offset: int, width: int) -> int:
        """One read of the config space of function 0 at `slot` of bus 0."""
        self.ask(f"outl 0xcf8 {self._config_address(slot, offset):#x}")
        return int(self.ask(f"in{_LETTERS[width]} {0xCFC + offset % 4:#x}")[0], 16)

    def config_write(self, slot: int, offset: int, width: int, value: int) -> None:
        """One write to config space."""
        self.ask(f"outl 0xcf8 {self._config_address(slot, offset):#x}")
        self.ask(f"out{_LETTERS[width]} {0xCFC + offset % 4:#x} {value:#x}")

    def reset(self) -> None:
        """Reset the machine; returns when that is done."""
        self.execute("system_reset", until="RESET")

    def close(self) -> None:
        """Let go of both channels."""
        self._channel.close()
        if self._monitor:
            self._monitor.close()

    def execute(self, command: str, arguments: dict[str, object] | None = None, *, until: str | None = None) -> None:
        """A QMP command; with `until`, returns when that event has come. RuntimeError with QEMU's words if refused."""
        assert self._monitor, "somebody else speaks QMP to this machine"
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
        self._monitor.flush()
        answered, happened = False, until is None
        while not (answered and happened):
            message = json.loads(self._monitor.readline())
            if "error" in message:
                raise RuntimeError(f"{command}: {message['error']}")
            answered |= "return" in message
            happened |= message.get("event") == until

    @staticmethod
    def _config_address(slot: int, offset: int) -> int:
        return 0x80000000 | slot << 11 | offset & 0xFC


@contextmanager
def machine(qemu: QemuRoot, arguments: Sequence[str]) -> Iterator[Qtest]:
    """A q35 with 64 MiB and `arguments`; ended at the end."""
    pairs = {name: socket.socketpair() for name in ("qtest", "qmp")}
    command = [*qemu.argv, "-machine", "q35", "-accel", "qtest", "-m", "64", "-nodefaults", "-display", "none"]
    for name, (ours, theirs) in pairs.items():
        ours.settimeout(_SECONDS)
        command += ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]
    command += ["-qtest", "chardev:qtest", "-qtest-log", "none", "-qmp", "chardev:qmp", *arguments]
    process = subprocess.Popen(
        command,
        env=os.environ | qemu.environment,
        pass_fds=[theirs.fileno() for _, theirs in pairs.values()],
        stdin=subprocess.DEVNULL,
    )
    try:
        for _, theirs in pairs.values():
            theirs.close()
        qtest = Qtest(pairs["qtest"][0], pairs["qmp"][0], process)
        yield qtest
        qtest.close()
    finally:
        for ours, _ in pairs.values():
            ours.close()
        process.terminate()
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
