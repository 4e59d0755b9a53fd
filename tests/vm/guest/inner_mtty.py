"""Checks in the test machine that a machine inside it moves with mtty, which the kernel migrates: `inner_mtty.py`.

Once our server presents it to vfio-user-pci, once QEMU has it from the kernel by vfio-pci; the outcome has to be equal.
The guest is the check itself, which looks at every register, then Linux with its own driver for the card.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.qemu.qtest import Qtest
from tests.qemu_migration.side import SLOT
from tests.server.programs import Server
from tests.vm.guest import checks, mtty_ports
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS
from tests.vm.guest.inner_moves import PATCHED, RELEASED, SECONDS, Place, keep_moving, linux, machine, served_at
from tests.vm.guest.mtty_ports import IER, IIR_FCR, TEXT, clear, empty, look, use
from tools.qemu_root import QemuRoot

checks.SECONDS = CHECK_SECONDS
SERVED = [f"83b8f4f2-509f-382f-3c1e-e6bfe0fa200{n}" for n in range(2)]
PLAIN = [f"83b8f4f2-509f-382f-3c1e-e6bfe0fa300{n}" for n in range(2)]
BARS = (0xC000, 0xC100)
MOVES, ROUNDS = 10, 20
LINE = 11
NO_UNMASK = r"DEVICE_SET_IRQS: \S+: the kernel answered: Inappropriate ioctl for device \d+"
"""QEMU would have KVM unmask the pin, which mtty cannot, and does it itself then; so it is by vfio-pci."""

running: dict[str, Server] = {}
outcomes: dict[str, list[object]] = {}


def socket_of(uuid: str) -> Path:
    return Path("/run") / f"{uuid[-4:]}.sock"


def servers() -> list[Server]:
    """One for each device."""
    for uuid in SERVED:
        if uuid not in running:
            options = ("--plugin", "vfio", "--mdev", uuid, "--socket-path", socket_of(uuid), "--require-migration")
            running[uuid] = Server(*options)
            running[uuid].wait_log("listening at", SECONDS)
    return [running[uuid] for uuid in SERVED]


OURS = [served_at(socket_of(uuid)) for uuid in SERVED]
THE_KERNELS = [
    {"driver": "vfio-pci", "sysfsdev": f"/sys/bus/mdev/devices/{uuid}", "enable-migration": "on"} for uuid in PLAIN
]


def what_servers_said() -> str:
    """End the servers; their logs."""
    logs = ""
    while running:
        uuid, server = running.popitem()
        server.process.kill()
        server.wait(SECONDS)
        logs += f"--- server of {uuid}:\n{server.log}"
    return logs


# --- the check is the guest


def reader(guest: Qtest) -> Callable[[int, int], int]:
    return lambda port, offset: int(guest.ask(f"inb {BARS[port] + offset:#x}")[0], 16)


def writer(guest: Qtest) -> Callable[[int, int, int], None]:
    def write(port: int, offset: int, value: int) -> None:
        guest.ask(f"outb {BARS[port] + offset:#x} {value:#x}")

    return write


def set_up(guest: Qtest) -> None:
    """The BARs, and the pin to line 11 of the first interrupt controllers, which is taken by its level."""
    for number, base in enumerate(BARS):
        guest.config_write(SLOT, 0x10 + 4 * number, 4, base)
    guest.config_write(SLOT, 0x04, 2, 0x1)
    for register in (*range(0x60, 0x64), *range(0x68, 0x6C)):
        guest.config_write(31, register, 1, LINE)
    guest.ask("outb 0x4d1 0x08")


def pin_is_raised(guest: Qtest) -> bool:
    guest.ask("outb 0xa0 0x0a")
    return bool(int(guest.ask("inb 0xa0")[0], 16) & 1 << LINE - 8)


def until(guest: Qtest, raised: bool) -> None:
    """Ask again and again; each question is a message."""
    for _ in range(5000):
        if pin_is_raised(guest) is raised:
            return
    raise AssertionError(f"the pin is never {'raised' if raised else 'taken down'}")


def registers_move(name: str, qemu: QemuRoot, places: Sequence[Place], servers: Sequence[Server] = ()) -> list[object]:
    """There and back, with a full FIFO, a divisor in view, and an interrupt at each place; what was seen."""
    seen: list[object] = []
    with machine(name, qemu, places, servers) as moving:
        set_up(moving.side.guest)
        clear(writer(moving.side.guest))
        for scratch in (0x5A, 0xA5, 0x3C, 0xC3):
            guest = moving.side.guest
            use(writer(guest), scratch)
            guest.config_write(SLOT, 0x3C, 1, scratch)
            before = look(reader(guest))
            transferred = moving.move()["vfio"]["transferred"]
            equal(transferred > 0, True, "bytes of the device's state")
            guest = moving.side.guest
            equal(look(reader(guest)), before, "registers")
            # mtty's own state does not have it, and QEMU leaves it to the device: only our server carries it.
            if servers:
                equal(guest.config_read(SLOT, 0x3C, 1), scratch, "the interrupt line's register")
            contents = empty(reader(guest))
            equal(contents, TEXT, "the FIFO's contents")
            clear(writer(guest))
            writer(guest)(0, IER, 0x02)  # the transmitter is empty
            until(guest, raised=True)
            cause = reader(guest)(0, IIR_FCR)
            until(guest, raised=False)
            writer(guest)(0, IER, 0)
            seen.append((before, contents, cause))
        moving.report()
    return seen


def check_registers_by_our_server() -> None:
    outcomes["registers, ours"] = registers_move("registers-vfio-user-pci", PATCHED, OURS, servers())


def check_registers_by_the_kernel() -> None:
    outcomes["registers, the kernel's"] = registers_move("registers-vfio-pci", PATCHED, THE_KERNELS)


def check_registers_by_the_kernel_and_qemu_as_released() -> None:
    outcomes["registers, as released"] = registers_move("registers-vfio-pci-released", RELEASED, THE_KERNELS)


def check_all_saw_the_same_registers() -> None:
    for other in ("the kernel's", "as released"):
        equal(outcomes["registers, ours"], outcomes[f"registers, {other}"], other)


# --- Linux is the guest


def serial_moves(name: str, qemu: QemuRoot, places: Sequence[Place], servers: Sequence[Server] = ()) -> None:
    """A driver's work goes on over ten moves; each byte that was sent has come back once, by the driver's own count.

    Not with QEMU as released: it loses interrupts that are under way at the moment of the stop, also by vfio-pci.
    """
    with linux(name, qemu, places, "serial", servers, NO_UNMASK) as guest:
        progress = keep_moving(guest, MOVES, ROUNDS)
        bytes_of_each = progress.rounds * len(TEXT)
        equal(progress.figures, {"first": bytes_of_each, "second": bytes_of_each, "errors": 0}, "bytes that came")


def check_guest_at_work_by_our_server() -> None:
    serial_moves("serial-vfio-user-pci", PATCHED, OURS, servers())


def check_guest_at_work_by_the_kernel() -> None:
    serial_moves("serial-vfio-pci", PATCHED, THE_KERNELS)


def check_servers_end_in_order() -> None:
    servers()
    for uuid, server in running.items():
        equal(server.end(seconds=SECONDS)[0], 0, f"{uuid}: {server.log}")
        equal("Traceback" in server.log, False, server.log)


for each in (*SERVED, *PLAIN):
    mtty_ports.create(each, "mtty-2")
checks.run(globals(), what_servers_said)
