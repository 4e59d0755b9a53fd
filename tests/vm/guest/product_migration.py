"""Checks in the test machine that edu moves between two real functions under kernel VFIO: `product_migration.py`.

Two servers, each with an edu of the machine's own; the client of the test kit does what a VMM does. The way into VFIO
is the one that the kernel has.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.server.programs import Server
from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.kmsg import KernelLog
from tests.vm.guest.served import IOVA, SECONDS, connect, edu_of, serve
from vfu_server.testing import EduDriver, Guest, ReplyError, load, migrate_guest, save
from vfu_server.testing.edu import (
    BUFFER,
    BUFFER_SIZE,
    DMA_FROM_DEVICE,
    IRQ_DMA,
    REG_DMA_COMMAND,
    REG_DMA_COUNT,
    REG_DMA_DESTINATION,
    REG_DMA_SOURCE,
    REG_FACTORIAL,
    REG_IRQ_STATUS,
    REG_LIVENESS,
    REG_STATUS,
)
from vfu_server.uapi import PCI_COMMAND, IrqIndex, MigState, RegionIndex

NARROW = (REG_LIVENESS, REG_FACTORIAL, REG_STATUS, REG_IRQ_STATUS)
WIDE = (REG_DMA_SOURCE, REG_DMA_DESTINATION, REG_DMA_COUNT, REG_DMA_COMMAND)
MSI_CAPABILITY = range(0x40, 0x50)
"""Set up again by the VMM, which alone knows the addresses of its messages."""
FAULT = r"DMAR:.*(fault addr|DMA (Read|Write))"
CHANCE = random.Random(7)

running: dict[str, Server] = {}


def servers() -> list[str]:
    """The addresses of both functions, each with a server of its own."""
    found = pci.find(pci.EDU)
    for bdf in found:
        if bdf not in running:
            pci.bind(bdf)
            running[bdf] = serve(bdf)
    return found


def give_up() -> str:
    """End the servers; their logs."""
    logs = ""
    while running:
        bdf, server = running.popitem()
        server.process.kill()
        server.wait(SECONDS)
        logs += f"the log of {bdf}'s server:\n{server.log}"
    return logs


@contextmanager
def guests() -> Iterator[tuple[Guest, Guest]]:
    """A guest at work, and one that waits at the other function for it to arrive, each with memory of its own."""
    source, destination = servers()
    with connect(source) as here, connect(destination) as there:
        here.start()
        there.plug_in()
        there.machine_reset()
        yield here, there
        here.memory.close()
        there.memory.close()


def driver_of(guest: Guest, use: str) -> EduDriver:
    """A driver that takes its interrupts by `use_msi` or `use_intx`."""
    driver = edu_of(guest)
    getattr(driver, use)()
    return driver


def moved(guest: Guest) -> EduDriver:
    """The driver that finds itself in another place."""
    return EduDriver(guest, timeout=SECONDS, by_interrupt=True)


def registers(guest: Guest) -> dict[int, int]:
    """What the guest reads."""
    found = {offset: guest.read(0, offset, 4) for offset in NARROW}
    return found | {offset: guest.read(0, offset, 8) for offset in WIDE}


def config(guest: Guest) -> list[int]:
    """Config space but for the VMM's part."""
    space = guest.client.read_block(RegionIndex.CONFIG, 0, 256)
    return [byte for at, byte in enumerate(space) if at not in MSI_CAPABILITY]


def there_and_back(use: str) -> None:
    with guests() as (here, there):
        driver_of(here, use)
        log = KernelLog()
        for n in (5, 9):
            driver = moved(here)
            contents = CHANCE.randbytes(BUFFER_SIZE)
            here.memory.write(IOVA, contents)
            driver.copy_to_device(IOVA, BUFFER_SIZE)
            driver.liveness(CHANCE.getrandbits(32))
            equal(driver.factorial(n), {5: 120, 9: 362880}[n], f"{n}!")
            here.write(0, REG_DMA_SOURCE, 8, CHANCE.getrandbits(60))
            here.config.write(0x3C, 1, CHANCE.randrange(256))
            before, space = registers(here), config(here)
            migrate_guest(here, there)
            equal(registers(there), before, "registers")
            equal(config(there), space, "config space")
            equal(there.interrupts and there.interrupts.index, here.interrupts and here.interrupts.index, "interrupts")
            # The source has to leave its last state before somebody can move back to it.
            here.client.set_mig_state(MigState.RUNNING)
            equal(registers(here), before, "the source's registers, which a save leaves alone")
            here, there = there, here
            driver = moved(here)
            driver.copy_from_device(IOVA + BUFFER_SIZE, BUFFER_SIZE)
            equal(here.memory.read(IOVA + BUFFER_SIZE, BUFFER_SIZE) == contents, True, "the buffer")
            here.memory.write(IOVA, contents[::-1])
            driver.copy_to_device(IOVA, BUFFER_SIZE)
        equal([line for line in log.new() if re.search(FAULT, line)], [], "faults in the IOMMU")
        log.close()


def check_both_servers_start() -> None:
    equal(len(servers()), 2, "functions, each with a server")


def check_there_and_back_with_msi() -> None:
    there_and_back("use_msi")


def check_there_and_back_with_intx() -> None:
    there_and_back("use_intx")


def check_pending_interrupts_arrive() -> None:
    for use, index in (("use_msi", IrqIndex.MSI), ("use_intx", IrqIndex.INTX)):
        with guests() as (here, there):
            driver_of(here, use).raise_interrupt(0x30)
            migrate_guest(here, there)
            if there.interrupts is None:
                raise AssertionError("no interrupts on the destination")
            equal(there.interrupts.index, index, "interrupts")
            equal(there.interrupts.wait(0, SECONDS) >= 1, True, f"the interrupt that was pending, {use}")
            driver = moved(there)
            equal(driver.read32(REG_IRQ_STATUS), 0x30, "interrupt status")
            driver.acknowledge(0x30)
            there.interrupts.count(0)
            equal(driver.factorial(6), 720, "6!")


def check_a_transfer_under_way_ends_before_the_move() -> None:
    with guests() as (here, there):
        driver = driver_of(here, "use_msi")
        data = b"on the way while the device stops"
        here.memory.write(IOVA, data)
        driver.copy_to_device(IOVA, len(data))
        driver.begin_dma(BUFFER, IOVA + BUFFER_SIZE, len(data), DMA_FROM_DEVICE)
        migrate_guest(here, there)
        equal(there.memory.read(IOVA + BUFFER_SIZE, len(data)), data, "what the transfer brought")
        equal(moved(there).read32(REG_IRQ_STATUS), IRQ_DMA, "its interrupt")
        moved(there).finish_dma()


def check_the_source_is_at_rest() -> None:
    with guests() as (here, there):
        driver = driver_of(here, "use_msi")
        driver.liveness(0x12345678)
        migrate_guest(here, there)
        equal(here.client.mig_state(), MigState.STOP, "the source's state")
        driver.write32(REG_LIVENESS, 0x1111)
        driver.begin_dma(BUFFER, IOVA, 64, DMA_FROM_DEVICE)
        equal(moved(there).read32(REG_LIVENESS), 0xEDCBA987, "liveness on the destination")
        here.client.set_mig_state(MigState.RUNNING)
        equal(driver.read32(REG_LIVENESS), 0xEDCBA987, "liveness of the source: what was written at rest is gone")
        equal(driver.read32(REG_DMA_COMMAND), 0, "the transfer that was asked for at rest")
        equal(here.config.read(PCI_COMMAND, 2), there.config.read(PCI_COMMAND, 2), "COMMAND")


def check_state_that_was_damaged_is_refused() -> None:
    with guests() as (here, there):
        driver = driver_of(here, "use_msi")
        here.client.set_mig_state(MigState.STOP_COPY)
        data = bytearray(b"".join(save(here.client)))
        here.client.set_mig_state(MigState.RUNNING)
        data[len(data) // 2] ^= 0x40
        there.client.set_mig_state(MigState.RESUMING)
        try:
            load(there.client, [bytes(data)])
            there.client.set_mig_state(MigState.RUNNING)
        except ReplyError as error:
            equal(error.errno > 0, True, "errno")
        else:
            raise AssertionError("a state with a bit turned over was taken")
        equal(driver.factorial(7), 5040, "7! on the source, which goes on")
        there.client.reset()
        migrate_guest(here, there)
        equal(moved(there).factorial(8), 40320, "8! on the destination after a sound state")


def check_the_servers_end_well() -> None:
    servers()
    while running:
        bdf, server = running.popitem()
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), f"{bdf}: {server.log}")


checks.run(globals(), give_up)
