"""Checks in the test machine of a machine inside it with two ConnectX functions under kernel VFIO: `inner_two.py`.

QEMU maps the BARs of each into the DMA of the other. One server knows the BARs of both, and they are saved and
restored with frames under way; to two servers the other's are memory out of reach, and they refuse, which the guest
must not feel.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plugins.mlx5.models.traffic import AREA, Traffic
from tests.qemu_migration.moves import prepare
from tests.qemu_migration.side import Side
from tests.server.programs import Server
from tests.vm.guest import checks, pci
from tests.vm.guest.checks import equal
from tests.vm.guest.inner_machine import CHECK_SECONDS
from tests.vm.guest.inner_moves import PATCHED, end, no_late_access, served_at
from tests.vm.guest.pairs import Pairs
from tests.vm.guest.qtest_guest import Port, QtestGuest
from tests.vm.guest.served import IOVA, SECONDS, socket_of

checks.SECONDS = CHECK_SECONDS
VENDOR, PF, VF = 0x15B3, 0x1021, 0x101E
SLOTS = (4, 5)
FRAMES = 30
STATE = Path("/tmp/state")

pairs = Pairs("mlx5", (VENDOR, VF), (VENDOR, PF), "vf=0")


@contextmanager
def machine(name: str, *arguments: str) -> Iterator[Side]:
    """A QEMU with both VFs."""
    folder = Path("/results") / name
    folder.mkdir()
    devices = []
    for slot, bdf in zip(SLOTS, pci.find((VENDOR, VF)), strict=True):
        device = {"id": f"device{slot}", "addr": f"{slot:#x}", **served_at(socket_of(bdf))}
        devices += ["-device", json.dumps(device)]
    with Side(PATCHED, folder, *devices, *arguments, server=None, memory="4M") as side:
        prepare(side, capabilities={"return-path": False})
        yield side


def at_work(side: Side) -> tuple[list[QtestGuest], list[Traffic]]:
    """Frames on each, in memory of its own, some of them under way."""
    guests = [QtestGuest.started(side.guest, slot) for slot in SLOTS]
    traffics = [Traffic(Port(guest), base=IOVA + number * AREA) for number, guest in enumerate(guests)]
    for traffic in traffics:
        traffic.start()
        traffic.run(FRAMES)
    for traffic in traffics:
        traffic.post(FRAMES // 2)
    return guests, traffics


@contextmanager
def one_server() -> Iterator[Server]:
    """One for both, which belong to one machine."""
    text = ""
    for vf, pf in zip(pci.find((VENDOR, VF)), pci.find((VENDOR, PF)), strict=True):
        for bdf in (vf, pf):
            pci.bind(bdf)
        text += f'[[device]]\nplugin = "mlx5"\nbdf = "{vf}"\nmachine = "one"\nsocket-path = "{socket_of(vf)}"\n'
        text += f'[device.options]\npf = "{pf}"\nvf = 0\n'
    file = Path("/tmp/server.toml")
    file.write_text(text)
    with Server("--config", file) as server:
        for vf in pci.find((VENDOR, VF)):
            server.wait_log(f"listening at {socket_of(vf)}", SECONDS)
        try:
            yield server
        except Exception as error:
            server.process.kill()
            server.wait(SECONDS)
            raise AssertionError(f"{error}\nthe server's log:\n{server.log}") from error
        equal(server.end(seconds=SECONDS)[0], 0, server.log)
        equal("Traceback" in server.log, False, server.log)


def check_devices_of_two_servers_are_refused_and_left_at_work() -> None:
    pairs.servers()
    with machine("two-servers") as side:
        _, traffics = at_work(side)
        side.monitor.execute("migrate", uri=f"file:{STATE}")
        equal(side.monitor.wait_migration()["status"], "failed", "the migration")
        equal((side.status(), "Resetting" in side.log), ("running", False), side.log)
        for traffic in traffics:
            traffic.finish()
            traffic.run(FRAMES)
        end(side)
    for log in pairs.end().values():
        equal("a BAR of another server's device" in log, True, log)


def check_devices_of_one_server_are_saved_and_restored() -> None:
    with one_server() as server:
        with machine("saved") as side:
            guests, traffics = at_work(side)
            side.monitor.execute("migrate", uri=f"file:{STATE}")
            equal(side.monitor.wait_migration()["status"], "completed", f"the migration: {side.log}")
            no_late_access(server)
            end(side)
        with machine("restored", "-incoming", "defer") as side:
            side.monitor.execute("migrate-incoming", uri=f"file:{STATE}")
            side.monitor.wait_event("RESUME")
            for guest, traffic in zip(guests, traffics, strict=True):
                traffic.moved(Port(guest.at(side.guest)))
                traffic.finish()
                traffic.run(FRAMES)
            end(side)
        STATE.unlink()


checks.run(globals(), pairs.give_up)
