"""Checks in the test machine of a device that its driver in the kernel migrates: `mtty.py group|cdev`.

mtty is the kernel's sample: a mediated device of two 16550 ports with migration v2, P2P and pre-copy. Our server moves
it from one to another, and a program of plain ioctls takes and gives what the driver's data fd carries.
"""

import errno
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server.programs import Server
from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.mtty_ports import IER, SCR, TEXT, clear, create, empty, look, use
from tests.vm.guest.raw_vfio import CdevDevice, GroupDevice, RawDevice
from vfu_server.device import Section
from vfu_server.kernel_migration import SECTION_VERSION, TAG
from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import Origin, StreamReader, StreamSection, StreamWriter
from vfu_server.testing import Client, ReplyError, migrate, save, save_early
from vfu_server.testing.migrate import load
from vfu_server.uapi import IrqIndex, MigState, RegionIndex

DOOR = sys.argv[1]
pci.DEVICES = Path("/sys/bus/mdev/devices")  # every address here is a mediated device's
SOURCE, TARGET, PLAIN, SINGLE = (f"83b8f4f2-509f-382f-3c1e-e6bfe0fa100{n}" for n in range(4))
TYPES = {SOURCE: "mtty-2", TARGET: "mtty-2", PLAIN: "mtty-2", SINGLE: "mtty-1"}
FEATURE, GET, SET, MIG_DEVICE_STATE, MIGRATION = 0x3B75, 0x10000, 0x20000, 2, 1
HEADER, PORT = 24, 36
"""Bytes of mtty's state: its header, and each port."""
MAGIC = 0x7E9D09898C3E2C4E
ALL_FLAGS = 7
SECONDS = 120.0
LINE = (int(RegionIndex.CONFIG), 0x3C)


def reader(device: Client | RawDevice) -> Callable[[int, int], int]:
    """Reads a byte of a port."""
    return lambda port, offset: device.read(port, offset, 1)


def writer(device: Client | RawDevice) -> Callable[[int, int, int], None]:
    """Writes a byte of a port."""
    return lambda port, offset, value: device.write(port, offset, 1, value)


# --- our server


def make_devices() -> None:
    """One of each, and the way by which they are opened."""
    for uuid, kind in TYPES.items():
        create(uuid, kind)
    if DOOR == "group":
        Path("/dev/iommu").unlink(missing_ok=True)


SERVERS: dict[str, Server] = {}
"""One for each device, for all checks."""


def socket_of(uuid: str) -> Path:
    """Where its server listens."""
    return Path("/run") / f"{uuid[-1]}.sock"


def server_of(uuid: str) -> Server:
    """The device's server, started when it is first asked for."""
    if uuid not in SERVERS:
        options = ("--plugin", "vfio", "--mdev", uuid, "--socket-path", socket_of(uuid), "--require-migration")
        SERVERS[uuid] = Server(*options)
        SERVERS[uuid].wait_log("listening at", SECONDS)
    return SERVERS[uuid]


@contextmanager
def served(*uuids: str) -> Iterator[list[Client]]:
    """A new client for each; what the last one has left in the ports is cleared away."""
    for uuid in uuids:
        server_of(uuid)
    clients = [connect(uuid) for uuid in uuids]
    try:
        for uuid, client in zip(uuids, clients, strict=True):
            clear(writer(client), int(TYPES[uuid][-1]))
        yield clients
    finally:
        for client in clients:
            client.close()


def connect(uuid: str) -> Client:
    """A client that has negotiated."""
    client = Client.connect(socket_of(uuid), timeout=SECONDS)
    client.negotiate()
    return client


def what_servers_said() -> str:
    """Their logs up to now, for the report of a check that failed."""
    for server in SERVERS.values():
        while select.select([server.process.stderr], [], [], 0)[0] and (
            chunk := os.read(server.process.stderr.fileno(), 65536)
        ):
            server.log += chunk.decode()
    return "".join(f"--- server of {uuid}:\n{server.log}" for uuid, server in SERVERS.items())


def saved(client: Client, *, early: bool) -> bytes:
    """The device's stream; the device is in STOP_COPY."""
    stream = b""
    if early:
        client.set_mig_state(MigState.PRE_COPY)
        stream = b"".join(save_early(client))
    client.set_mig_state(MigState.STOP_COPY)
    return stream + b"".join(save(client))


def items_of(stream: bytes) -> list[object]:
    """What a stream says, all sums right."""
    stream_reader = StreamReader(crc32c)
    items = stream_reader.push(stream)
    stream_reader.finish()
    return list(items)


def kernel_bytes(stream: bytes) -> bytes:
    """The driver's, from where docs/plugins/kernel-migration.md says that they lie."""
    sections = (item for item in items_of(stream) if isinstance(item, StreamSection))
    return b"".join(item.section.payload for item in sections if item.section.tag == TAG)


def with_kernel_bytes(stream: bytes, pieces: Iterable[bytes]) -> bytes:
    """The stream with other bytes of a driver in it."""
    header, *items = items_of(stream)
    stream_writer = StreamWriter(header, crc32c)
    out = [stream_writer.begin()]
    for item in items:
        if isinstance(item, StreamSection) and item.origin is Origin.SERVER:
            out += stream_writer.section(item.section, Origin.SERVER)
    for piece in pieces:
        out += stream_writer.section(Section(TAG, SECTION_VERSION, piece), Origin.PLUGIN)
    return b"".join([*map(bytes, out), stream_writer.end()])


def without_history(data: bytes) -> bytes:
    """The driver's bytes without those of FIFOs that nobody can see: what had been in them before."""
    ports = [bytearray(data[at : at + PORT]) for at in range(HEADER, len(data), PORT)]
    for port in ports:
        count = port[8 + 18]
        port[8 + count : 8 + 16] = bytes(16 - count)
    return data[:HEADER] + b"".join(ports)


def refused(call: Callable[..., object], *arguments: object) -> str:
    """The name of the errno that a client is answered, or nothing."""
    try:
        call(*arguments)
    except ReplyError as error:
        return errno.errorcode[error.errno]
    return ""


# --- plain ioctls


@contextmanager
def plain() -> Iterator[RawDevice]:
    """A device of this program's own, without the product."""
    with (GroupDevice if DOOR == "group" else CdevDevice)(PLAIN) as device:
        device.info()
        for index in (0, 1, RegionIndex.CONFIG):
            device.region(index)
        yield device


def set_state(device: RawDevice, state: MigState) -> int:
    """SET MIG_DEVICE_STATE; the data fd, or -1."""
    buffer = bytearray(struct.pack("=IIIi", 16, SET | MIG_DEVICE_STATE, state, -1))
    fcntl.ioctl(device.fd, FEATURE, buffer)
    return int(struct.unpack_from("=i", buffer, 12)[0])


def plain_save(device: RawDevice) -> bytes:
    """All that the driver's data fd gives, read in odd pieces; the device runs again."""
    fd = set_state(device, MigState.STOP_COPY)
    data = b"".join(iter(lambda: os.read(fd, 7), b""))
    os.close(fd)
    set_state(device, MigState.RUNNING)
    return data


def plain_load(device: RawDevice, data: bytes) -> None:
    """The same the other way round."""
    fd = set_state(device, MigState.RESUMING)
    for at in range(0, len(data), 11):
        os.write(fd, data[at : at + 11])
    os.close(fd)
    set_state(device, MigState.RUNNING)


# --- checks


def check_what_is_offered() -> None:
    with served(SOURCE) as (client,):
        log = server_of(SOURCE).log
        equal(f"({DOOR}, driver mtty)" in log, True, log)
        equal((client.migration_flags(), client.mig_state()), (ALL_FLAGS, MigState.RUNNING))
        equal(client.mig_data_size() >= HEADER + 2 * PORT, True, "the driver's size")
        equal(client.read(RegionIndex.CONFIG, 0, 4), 0x32534348, "vendor and device")
        sizes = [client.get_region_info(index).size for index in (0, 1, 2, RegionIndex.CONFIG)]
        equal(sizes, [8, 8, 0, 0xFF], "regions")
        equal([client.get_irq_info(index).count for index in range(5)], [1, 1, 0, 0, 0], "interrupts")
        equal(client.get_info().can_reset, True, "it takes a reset, and does not say so")


def check_every_state_and_a_client_that_goes_in_it() -> None:
    for state in MigState:
        with served(SOURCE) as (client,):
            equal(client.mig_state(), MigState.RUNNING, f"before {state.name}")
            if state is not MigState.ERROR:
                client.set_mig_state(state)
                equal(client.mig_state(), state)
    with served(SOURCE) as (client,):
        equal(client.mig_state(), MigState.RUNNING, "in the end")


def moved(*, pre_copy: bool) -> None:
    with served(SOURCE, TARGET) as (source, target):
        use(writer(source), 0x5A)
        source.write(*LINE, 1, 11)
        target.write(*LINE, 1, 5)
        before = look(reader(source))
        equal(look(reader(target)) == before, False, "the target looks otherwise")
        record = migrate(source, target, pre_copy=pre_copy)
        equal(record.pre_copy_bytes > 0, pre_copy, "bytes of the pre-copy")
        equal(look(reader(target)), before, "registers")
        equal(target.read(*LINE, 1), 11, "the interrupt line")
        equal(empty(reader(target)), TEXT, "the FIFO's contents")
        equal((source.mig_state(), target.mig_state()), (MigState.STOP, MigState.RUNNING))
        equal(source.read(0, SCR, 1), 0xFF, "nothing reaches a stopped device")
        source.set_mig_state(MigState.RUNNING)
        equal(look(reader(source)), before, "the source, if it runs on")


def check_moves() -> None:
    moved(pre_copy=False)


def check_moves_with_a_pre_copy() -> None:
    moved(pre_copy=True)


def check_pre_copy_numbers_are_the_drivers() -> None:
    with served(SOURCE) as (client,):
        equal(refused(client.precopy_info), "EINVAL", "while it runs")
        client.set_mig_state(MigState.PRE_COPY_P2P)
        equal(client.precopy_info().initial_bytes > HEADER, True, "the driver's header, in its section")
        client.set_mig_state(MigState.PRE_COPY)
        early = b"".join(save_early(client))
        equal(early.count(struct.pack("<Q", MAGIC)), 1, "the driver's header goes ahead")
        equal(client.precopy_info().initial_bytes + client.precopy_info().dirty_bytes, 0)
        equal(refused(client.mig_data_read), "ENOMSG")
        client.set_mig_state(MigState.RUNNING)
        equal(refused(client.precopy_info), "EINVAL", "after it was cancelled")


def check_interrupts_of_a_device_that_was_moved() -> None:
    with served(SOURCE, TARGET) as (source, target):
        migrate(source, target)
        for index in (IrqIndex.INTX, IrqIndex.MSI):
            signalled = os.eventfd(0, os.EFD_NONBLOCK)
            target.set_irq_eventfds(index, 0, [signalled])
            target.write(0, IER, 1, 0x02)  # the transmitter is empty
            equal(os.eventfd_read(signalled), 1, index.name)
            target.disable_irqs(index)
            os.close(signalled)


def check_our_stream_is_loaded_by_a_plain_program() -> None:
    for early in (False, True):
        with served(SOURCE) as (client,), plain() as other:
            clear(writer(other))
            use(writer(client), 0x3C)
            before = look(reader(client))
            data = kernel_bytes(saved(client, early=early))
            equal(struct.unpack_from("<QIIII", data), (MAGIC, 1, 0, 2, 0), "the driver's header")
            equal(len(data), HEADER + 2 * PORT)
            plain_load(other, data)
            equal(look(reader(other)), before, "registers")
            equal(empty(reader(other)), TEXT, "the FIFO's contents")


def check_stream_of_a_plain_program_is_loaded_by_us() -> None:
    with served(TARGET) as (client,), plain() as other:
        clear(writer(other))
        use(writer(other), 0xC3)
        before = look(reader(other))
        data = plain_save(other)
        equal(look(reader(other)), before, "nothing was changed by that")
        template = saved(client, early=True)
        client.set_mig_state(MigState.STOP)
        client.set_mig_state(MigState.RESUMING)
        load(client, [with_kernel_bytes(template, [data[:30], data[30:]])])
        client.set_mig_state(MigState.RUNNING)
        equal(look(reader(client)), before, "registers")
        equal(empty(reader(client)), TEXT, "the FIFO's contents")


def check_the_same_bytes_by_both() -> None:
    with served(SOURCE) as (client,), plain() as other:
        clear(writer(other))
        for one in (client, other):
            use(writer(one), 0x77)
        ours, plainly = kernel_bytes(saved(client, early=True)), plain_save(other)
        equal(without_history(ours), without_history(plainly))


def check_state_that_the_driver_refuses() -> None:
    with served(TARGET) as (client,):
        template = saved(client, early=False)
        data = kernel_bytes(template)
        wrong = {
            "another magic": [b"\0" + data[1:]],
            "another version": [data[:8] + struct.pack("<I", 2) + data[12:]],
            "too much": [data, b"x"],
            "too little": [data[:-1]],
            "nothing": [],
        }
        for what, pieces in wrong.items():
            client.reset()
            use(writer(client), 0x11)
            before = look(reader(client))
            client.set_mig_state(MigState.RESUMING)
            # What the driver refuses as it comes in is told in the answer to the data already.
            refused(load, client, [with_kernel_bytes(template, pieces)])
            equal(refused(client.set_mig_state, MigState.RUNNING) != "", True, what)
            equal(client.mig_state(), MigState.RESUMING, what)
            client.reset()
            equal(client.mig_state(), MigState.RUNNING, what)
            equal(look(reader(client)), before, f"{what}: the device is as it was")
        client.set_mig_state(MigState.RESUMING)
        load(client, [template])
        client.set_mig_state(MigState.RUNNING)


def check_another_type_is_refused_before_the_driver_sees_it() -> None:
    with served(SINGLE, TARGET) as (single, target):
        stream = saved(single, early=False)
        target.set_mig_state(MigState.RESUMING)
        seen = refused(load, target, [stream]) or refused(target.set_mig_state, MigState.STOP)
        equal(seen, "EINVAL")
        server_of(TARGET).wait_log("'mtty-1', this device has 'mtty-2'", SECONDS)
        equal(target.mig_state(), MigState.RESUMING)


def check_dirty_pages_are_the_drivers() -> None:
    with served(SOURCE) as (client,):
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, 1 << 20)
        client.dma_map(0, 1 << 20, fd=fd)
        client.dma_logging_start([(0, 1 << 20)])
        equal(any(client.dma_logging_report(0, 1 << 20)), False, "it has no DMA")
        client.dma_logging_stop()
        client.dma_unmap(0, 1 << 20)
        os.close(fd)


def check_device_that_is_in_use_or_not_there() -> None:
    busy = {"cdev": "in use", "group": "another process has it"}[DOOR]
    with plain():
        for uuid, said in ((PLAIN, busy), (PLAIN[:-1] + "f", "no mediated device")):
            server = Server("--plugin", "vfio", "--mdev", uuid, "--socket-path", "/run/x.sock")
            equal(server.wait(SECONDS), 4, server.log)
            equal((said in server.log, "Traceback" in server.log), (True, False), server.log)


def check_doctor_of_a_mediated_device() -> None:
    command = [sys.executable, "-m", "vfu_server", "doctor", "--plugin", "vfio", "--mdev", PLAIN, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    equal((done.returncode, done.stderr), (0, ""), done.stdout)
    found = {row["name"]: row for row in json.loads(done.stdout)["checks"]}
    equal(found["open"]["text"].startswith(f"opened by its {DOOR}"), True, found["open"]["text"])
    equal(found["function"]["text"].endswith("of the type mtty-2"), True, found["function"]["text"])
    equal("stop-copy, p2p, pre-copy" in found["kernel-migration"]["text"], True, found["kernel-migration"]["text"])
    equal(found["migration"]["status"], "ok", found["migration"]["text"])


def check_servers_end_in_order() -> None:
    for uuid, server in SERVERS.items():
        equal(server.end(seconds=SECONDS)[0], 0, f"{uuid}: {server.log}")
        equal("Traceback" in server.log, False, server.log)


make_devices()
checks.run(globals(), what_servers_said)
