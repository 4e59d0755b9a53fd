"""Checks in the test machine of `--revoke` on a real kernel: a client's mapping is gone while edu is stopped.

The plugin is generic_dmaq with another policy, since its own lets nothing be mapped. A mapping is touched by a child,
which the kernel ends by SIGBUS where there is nothing. The way into VFIO is the one that the kernel has. A virtual
function of igb is refused.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.server.programs import install, run
from tests.vm.guest import checks, functions, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.served import IOVA, MEMORY, SECONDS, edu_of, serve, socket_of
from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import Origin, StreamReader
from vfu_server.testing import Guest, GuestMemory, save
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MEMORY, MigState

IDENTIFICATION, ANSWER = 0x00, 0x010000ED
IDS = bytes.fromhex("3412e811")
REST = (MigState.STOP, MigState.STOP_COPY)
PLUGIN = """
from plugins.generic_dmaq.device import DmaQueueDevice
from plugins.generic_dmaq.probe import probe
from vfu_server.hookspecs import hookimpl
from vfu_server.policy import Answer, Answers, Policy, Rule

VFU_SERVER_API = 1


class Mapped(DmaQueueDevice):
    @property
    def policy(self):
        answers = Answers.while_running(Answer.MMAP, Answer.DISCARD)
        return Policy((Rule(0, 0, 1 << 20, answers, answers, "all of it", "a test's"),), p2p_reason="a test's")


@hookimpl
def vfu_server_probe(host, options):
    made = probe(host, options)
    return Mapped(host, made.layout, type(made.hooks), made.drain_seconds)
"""


@cache
def site() -> Path:
    """Where the plugin is installed."""
    return install(Path("/tmp/mapped"), "mapped", {"mapped": PLUGIN})


@contextmanager
def guest_of(*options: str) -> Iterator[Guest]:
    """A guest that has started and maps the BAR, of a server for edu that ends with it."""
    bdf = functions.ready(pci.EDU)
    with serve(bdf, "--mmap", "all", *options, plugin="mapped", sites=[site()]) as server:
        memory = GuestMemory.of(MEMORY, IOVA)
        with memory, Guest.connect(socket_of(bdf), memory, timeout=SECONDS) as guest:
            guest.start()
            equal(guest._mapped(0, IDENTIFICATION, 4) is not None, True, "the BAR is mapped")
            yield guest
        code, _ = server.end(seconds=SECONDS)
        equal((code, "Traceback" in server.log), (0, False), server.log)


def touch(guest: Guest) -> str:
    """What comes of a read through the mapping: the value, or the name of the signal that ended the reader."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(theirs, b"%#x" % guest.read(0, IDENTIFICATION, 4))
        finally:
            os._exit(0)
    os.close(theirs)
    value = os.read(ours, 64).decode()
    os.close(ours)
    status = os.waitpid(child, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else value


def decodes(guest: Guest) -> bool:
    """Whether COMMAND has its memory bit."""
    return bool(guest.config.read(PCI_COMMAND, 2) & PCI_COMMAND_MEMORY)


def check_mapping_faults_while_stopped_and_comes_back() -> None:
    with guest_of("--revoke") as guest:
        for state in REST:
            equal((touch(guest), decodes(guest)), (hex(ANSWER), True), "while it runs")
            guest.client.set_mig_state(state)
            if state is MigState.STOP_COPY:
                b"".join(save(guest.client))
            equal((touch(guest), decodes(guest)), ("SIGBUS", False), state.name)
            guest.client.set_mig_state(MigState.RUNNING)
        equal((touch(guest), decodes(guest)), (hex(ANSWER), True), "in the end")
        equal(edu_of(guest).factorial(6), 720, "6!")


def check_saved_command_has_its_memory_bit() -> None:
    with guest_of("--revoke") as guest:
        guest.client.set_mig_state(MigState.STOP_COPY)
        reader = StreamReader(crc32c)
        items = list(reader.push(b"".join(save(guest.client))))
        (config,) = (item.section.payload for item in items if getattr(item, "origin", None) is Origin.SERVER)
        equal(config[:4], IDS, "the server's section is config space")
        command = int.from_bytes(config[PCI_COMMAND:][:2], "little")
        equal((command & PCI_COMMAND_MEMORY, decodes(guest)), (PCI_COMMAND_MEMORY, False), "saved, and as it is")


def check_reset_of_a_stopped_device_brings_it_back() -> None:
    with guest_of("--revoke") as guest:
        guest.client.set_mig_state(MigState.STOP)
        equal(touch(guest), "SIGBUS", "stopped")
        guest.client.reset()
        equal(touch(guest), hex(ANSWER), "after the reset")


def check_without_it_the_mapping_stays() -> None:
    with guest_of() as guest:
        guest.client.set_mig_state(MigState.STOP)
        equal((touch(guest), decodes(guest)), (hex(ANSWER), True), "stopped")


def check_virtual_function_is_refused() -> None:
    bdf = functions.virtual_functions()[0]
    done = run("--bdf", bdf, "--plugin", "vfio", "--revoke", "--mmap", "all", "--socket-path", "/run/vf.sock")
    equal((done.returncode != 0, "Traceback" in done.stderr), (True, False), done.stderr)
    equal("--revoke" in done.stderr and "no memory-enable bit" in done.stderr, True, done.stderr)


checks.run(globals())
