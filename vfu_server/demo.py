"""The guided tour: two servers, one device, a client that works on it, and a migration in the middle of its work.

It is a client like any other: it starts `vfu-server` twice as anybody would and speaks to it through the testing kit.
A step that does not hold ends the tour with exit code 1.
"""

import argparse
import contextlib
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vfu_server import uapi
from vfu_server.errors import VfuServerError
from vfu_server.testing.client import Client
from vfu_server.testing.edu import BUFFER, IRQ_DMA, REG_IRQ_STATUS, REG_LIVENESS, EduDriver
from vfu_server.testing.guest import Guest
from vfu_server.testing.memory import GuestMemory
from vfu_server.testing.migrate import MigrationRecord, migrate_guest
from vfu_server.uapi import IrqIndex, RegionIndex

START_DEADLINE = 20.0
MEMORY_SIZE = 16 << 20
DATA_AT = 1 << 20
RESULT_AT = 2 << 20
DATA_SIZE = 4096
PENDING = 0x40
JOBS = 3
MASK = 0xFFFFFFFF


class DemoError(VfuServerError):
    """A step of the tour did not hold."""


def expect(holds: bool, what: str) -> None:
    """End the tour if `what` is not so."""
    if not holds:
        raise DemoError(what)


@dataclass(slots=True)
class Terminal:
    """What the tour says: chapters, steps with their times, facts."""

    began: float
    color: bool

    def chapter(self, text: str) -> None:
        """A new chapter."""
        print(f"\n{self._paint('1;36', text)}", flush=True)

    def say(self, text: str) -> None:
        """Something to know."""
        print(f"         {text}", flush=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[list[str]]:
        """A step that takes a while; what is put into the list is told behind its time."""
        told: list[str] = []
        began = time.monotonic()
        yield told
        took = (time.monotonic() - began) * 1e3
        stamp = f"{time.monotonic() - self.began:7.2f}s"
        detail = f": {'; '.join(told)}" if told else ""
        print(f"{stamp} {self._paint('32', '✓')} {text}{detail} ({took:.1f} ms)", flush=True)

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color else text


class ServerProcess:
    """One `vfu-server` with the edu model behind it."""

    def __init__(self, role: str, folder: Path) -> None:
        self.socket = folder / f"{role}.sock"
        self.log = folder / f"{role}.log"
        self._log_file = self.log.open("wb")
        arguments = ["--plugin", "generic_dmaq", "--model", "edu", "--socket-path", str(self.socket)]
        self.command = f"vfu-server {' '.join(arguments)}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vfu_server", *arguments], stdin=subprocess.DEVNULL, stderr=self._log_file
        )

    def connect(self) -> Client:
        """A connection, as soon as the server listens."""
        deadline = time.monotonic() + START_DEADLINE
        while True:
            try:
                return Client.connect(self.socket)
            except (FileNotFoundError, ConnectionRefusedError):
                status = self._process.poll()
                expect(status is None, f"the server ended with {status}:\n{self.log.read_text(errors='replace')}")
                expect(time.monotonic() < deadline, f"the server did not listen within {START_DEADLINE} s")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)

    def resident_bytes(self) -> int:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(5)
        finally:
            self._log_file.close()

    def kill(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log_file.close()


@dataclass(slots=True)
class Work:
    """What the guest has the device do: numbered jobs, each computing a factorial and moving a page there and back."""

    memory: GuestMemory
    seed: random.Random
    done: int = 0

    def run(self, edu: EduDriver) -> None:
        """One job, checked."""
        n = 5 + self.done
        data = self.seed.randbytes(DATA_SIZE)
        self.memory.write(DATA_AT, data)
        self.memory.write(RESULT_AT, bytes(DATA_SIZE))
        product = edu.factorial(n)
        expect(product == _factorial(n), f"{n}! was computed as {product}")
        edu.copy_to_device(DATA_AT, DATA_SIZE)
        edu.copy_from_device(RESULT_AT, DATA_SIZE)
        expect(self.memory.read(RESULT_AT, DATA_SIZE) == data, f"job {self.done}: DMA gave other data back")
        self.done += 1


def _factorial(n: int) -> int:
    product = 1
    for i in range(2, n + 1):
        product = product * i & MASK
    return product


def meet(terminal: Terminal, server: ServerProcess) -> Guest:
    """Connect to the source as a VMM does, and tell what is there."""
    with terminal.step("connected and negotiated; the machine is reset, BARs are placed") as told:
        guest = Guest(server.connect(), GuestMemory.of(MEMORY_SIZE))
        guest.start()
        told.append(f"{guest.info.num_regions} regions, {guest.info.num_irqs} kinds of interrupt")
    vendor, device = guest.config.read(uapi.PCI_VENDOR_ID, 2), guest.config.read(uapi.PCI_DEVICE_ID, 2)
    sizes = [f"{RegionIndex(i).name} {r.size:#x} bytes" for i, r in sorted(guest.regions.items()) if r.size]
    counts = [f"{IrqIndex(i).name} {irq.count}" for i, irq in sorted(guest.irqs.items()) if irq.count]
    terminal.say(f"PCI device {vendor:04x}:{device:04x}; regions: {', '.join(sizes)}")
    terminal.say(f"interrupts: {', '.join(counts)}; migration flags {guest.client.migration_flags():#x}")
    terminal.say(f"{MEMORY_SIZE >> 20} MiB of guest memory are shared with the device by file descriptor")
    return guest


def drive(terminal: Terminal, guest: Guest, work: Work) -> EduDriver:
    """Use the device: registers, both kinds of interrupt, DMA with data checked."""
    edu = EduDriver(guest)
    with terminal.step("registers") as told:
        answer = edu.liveness(0x12345678)
        expect(answer == ~0x12345678 & MASK, f"the liveness register answered {answer:#x}")
        told.append(f"wrote 0x12345678, the device answers its complement {answer:#010x}")
    with terminal.step("an INTx interrupt") as told:
        edu.use_intx()
        told.append(f"12! = {edu.factorial(12)}, told by the pin")
    with terminal.step("an MSI interrupt") as told:
        edu.use_msi()
        told.append(f"10! = {edu.factorial(10)}, told by a message to an eventfd that the server never touches")
    with terminal.step("DMA through guest memory, both ways, data compared") as told:
        work.run(edu)
        told.append(f"2 x {DATA_SIZE} bytes, the device takes 100 ms for each")
    return edu


def leave_traces(guest: Guest, edu: EduDriver, work: Work) -> bytes:
    """Put the device in a state that would be missed: registers, a full buffer, an interrupt nobody has looked at."""
    kept = work.seed.randbytes(DATA_SIZE)
    work.memory.write(DATA_AT, kept)
    edu.copy_to_device(DATA_AT, DATA_SIZE)
    edu.liveness(0xCAFE0001)
    edu.raise_interrupt(PENDING)
    if guest.interrupts is not None:
        guest.interrupts.wait(0, 2)
        guest.interrupts.count(0)
    return kept


def move(terminal: Terminal, source: Guest, server: ServerProcess) -> tuple[Guest, MigrationRecord]:
    """Move the device and the memory to the destination."""
    with terminal.step("the destination's VMM connects and waits"):
        destination = Guest(server.connect(), GuestMemory.of(MEMORY_SIZE))
        destination.plug_in()
        destination.machine_reset()
    with terminal.step("migrated") as told:
        record = migrate_guest(source, destination)
        told.append(f"{record.stop_copy_bytes} bytes of device state, {record.memory_bytes >> 20} MiB of memory")
    for step in record.steps:
        terminal.say(f"{step.seconds * 1e3:8.1f} ms  {step.name}")
    terminal.say(f"{record.downtime * 1e3:8.1f} ms  downtime, from the stop to RUNNING on the destination")
    return destination, record


def check_arrival(terminal: Terminal, guest: Guest, kept: bytes, work: Work) -> None:
    """What was left behind on the source must be here."""
    edu = EduDriver(guest, by_interrupt=True)
    with terminal.step("registers arrived") as told:
        liveness = edu.read32(REG_LIVENESS)
        expect(liveness == ~0xCAFE0001 & MASK, f"liveness reads {liveness:#x}")
        told.append(f"liveness {liveness:#010x}")
    with terminal.step("the pending interrupt arrived") as told:
        expect(guest.interrupts is not None, "no interrupts are armed")
        if guest.interrupts is not None:
            guest.interrupts.wait(0, 2)
        status = edu.read32(REG_IRQ_STATUS)
        expect(status & PENDING == PENDING, f"interrupt status reads {status:#x}")
        edu.acknowledge(status)
        told.append(f"status {status:#x}, signalled on the destination's eventfd")
    with terminal.step("the device's 4 KiB buffer arrived") as told:
        guest.memory.write(RESULT_AT, bytes(DATA_SIZE))
        edu.begin_dma(BUFFER, RESULT_AT, DATA_SIZE, 2)
        edu.wait_interrupt(IRQ_DMA)
        arrived = guest.memory.read(RESULT_AT, DATA_SIZE)
        expect(arrived == kept, "the device's buffer holds other data")
        told.append(f"sha256 {hashlib.sha256(arrived).hexdigest()[:16]}… on both sides")
    work.memory = guest.memory
    with terminal.step("the client goes on with its work") as told:
        for _ in range(JOBS):
            work.run(edu)
        told.append(f"{JOBS} more jobs, {work.done} in all, none lost and none wrong")


def tour(terminal: Terminal, servers: dict[str, ServerProcess]) -> None:
    """The whole way."""
    source, destination = servers["source"], servers["destination"]
    terminal.chapter("1. Two servers, each with a software model of QEMU's edu device as its hardware")
    terminal.say(source.command)
    terminal.say(destination.command)
    guest = meet(terminal, source)
    terminal.say(f"resident memory of the server: {source.resident_bytes() / (1 << 20):.1f} MiB")
    terminal.chapter("2. A client uses the device as a virtual machine would")
    work = Work(guest.memory, random.Random(1))
    edu = drive(terminal, guest, work)
    terminal.chapter("3. The device moves to the other server while its client goes on")
    with terminal.step("one more job, and traces left: a full buffer, a written register, an interrupt pending"):
        work.run(edu)
        kept = leave_traces(guest, edu, work)
    arrived, _record = move(terminal, guest, destination)
    terminal.chapter("4. On the destination everything is as it was left")
    check_arrival(terminal, arrived, kept, work)
    guest.close()
    arrived.close()
    terminal.chapter("5. The end")
    for role, server in servers.items():
        with terminal.step(f"SIGTERM to the {role}") as told:
            status = server.stop()
            expect(status == 0, f"the {role} ended with {status}")
            told.append("device brought to rest, memory unmapped, socket removed, exit code 0")
        expect(not server.socket.exists(), f"the {role} left its socket behind")


def main(argv: list[str] | None = None) -> int:
    """Run the tour; 0 if every step held."""
    parser = argparse.ArgumentParser(prog="python -m vfu_server.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--no-color", action="store_true", help="plain text also on a terminal")
    arguments = parser.parse_args(argv)
    terminal = Terminal(time.monotonic(), sys.stdout.isatty() and not arguments.no_color)
    servers: dict[str, ServerProcess] = {}
    with tempfile.TemporaryDirectory(prefix="vfu-demo-") as folder:
        try:
            servers |= {role: ServerProcess(role, Path(folder)) for role in ("source", "destination")}
            tour(terminal, servers)
        except (VfuServerError, OSError) as error:
            print(f"\nThe tour ended early: {error}", file=sys.stderr)
            for note in getattr(error, "__notes__", []):
                print(f"  {note}", file=sys.stderr)
            for role, server in servers.items():
                print(f"\n--- log of the {role} ---\n{server.log.read_text(errors='replace')}", file=sys.stderr)
            return 1
        finally:
            for server in servers.values():
                server.kill()
    print("\nEverything held. Next: README.md, 'On real hardware'.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
