"""The golden stream of the plugin hns: a ZIP VF whose guest had all its queues full, and what it is loaded into.

Made by a real server before the plugin's model. Loaded before a model in this process, of whose registers and tables
it is asked what has come: they are read beside the plugin, and the state is taken apart here as docs/plugins say.
"""

import struct
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from plugins.hns.models.accelerator import functions
from plugins.hns.models.generation import Order
from plugins.hns.models.traffic import Traffic
from plugins.hns.probe import probe
from plugins.hns.registers import KINDS
from tests.end_to_end.streams import Parts
from tests.golden.in_process import ModelHost
from tests.golden.registry import Golden, told
from tests.plugins.hns.served import MEMORY, SECONDS, Served
from tests.plugins.mlx5.companion import OneCompanion
from vfu_server.device import Device, StopKind
from vfu_server.testing import GuestMemory, save
from vfu_server.uapi import MigState

MATCH = struct.Struct("<Q5I")
STATE = struct.Struct("<6I7I7I20x4x4Q")
MATCH_SIZE = 40
FIRST_MAGIC = 0xCDCDCDCDFEEDAACC
BAR, MAILBOX, GET = 2, 0x300, 1 << 14
WORDS = ("vf_state", "queue_isolation", "aeq_int_mask", "eq_int_mask", "page_size")
"""Registers that keep what is written. ifc_int_source and ifc_int_set act when written, ifc_int_mask is opened."""


class HnsPlace:
    """A VF with its PF beside it."""

    def __init__(self, host: ModelHost, device: Device) -> None:
        self.host = host
        self.device = device
        self._bits = host.header_bits()

    async def fresh(self) -> Device:
        await self.device.reset()
        await self.device.stop(StopKind.FULL)
        self._new = self._registers()
        self.host.writes.clear()
        self.host.model.violations.clear()
        return self.device

    def written(self) -> bool:
        """Questions to the mailbox change nothing."""
        return any(at != MAILBOX or not word & GET for at, word in self.host.writes)

    def _registers(self) -> dict[str, int]:
        vf = self.host.model
        state = vf.state()
        found = {name: state[name] for name in WORDS}
        found |= {f"{ring}{n}": state[f"{ring}{n}"] for ring in ("eqc", "aeqc") for n in range(7)}
        found["sqc"], found["cqc"] = vf.queues.tables
        return found

    async def differences(self, parts: Parts) -> list[str]:
        found = self._registers()
        wrong = self.host.header_differences(parts, self._bits)
        due = self._due(b"".join(told(parts, "kernel")))
        wrong += [f"{name}: {found[name]:#x}, not {value:#x}" for name, value in due.items() if found[name] != value]
        if violations := dict(self.host.model.violations):
            wrong.append(f"violations: {violations}")
        views = told(parts, "mailbox")
        if views:
            await self.device.start(StopKind.FULL)
            if (view := self.device.trap_read_block(BAR, MAILBOX, 16)) != views[-1]:
                wrong.append(f"the guest reads {view.hex()} of its mailbox")
        return wrong

    def _due(self, blob: bytes) -> dict[str, int]:
        """What the registers are to hold; those of a function that nobody used are as new."""
        magic, _, _, isolation, _, vf_state = MATCH.unpack_from(blob)
        if len(blob) == MATCH_SIZE:
            return self._new
        aeq, eq, _, _, _, page_size, *words = STATE.unpack_from(blob, MATCH_SIZE)
        eqe, aeqe, sqc, cqc = words[14:]
        if magic == FIRST_MAGIC:  # that version told wrong ones
            eqe, aeqe = (words[at] << 32 | words[at - 1] for at in (2, 9))
        if not all((eqe, aeqe, sqc, cqc)):
            return self._new
        due = dict(zip(WORDS, (vf_state, isolation, aeq, eq, page_size), strict=True))
        for name, ws, address in (("eqc", words[:7], eqe), ("aeqc", words[7:14], aeqe)):
            due |= {f"{name}{n}": word for n, word in enumerate(ws)}
            due |= {f"{name}1": address & 0xFFFFFFFF, f"{name}2": address >> 32}  # told twice: both must be right
        return due | {"sqc": sqc, "cqc": cqc}


@asynccontextmanager
async def place(parts: Parts):
    (kind,) = [kind for kind in KINDS if parts.header.state.variant == f"{kind.name} V3"]
    models = functions(Order(kind))
    vf, pf = ModelHost(models["vf0"], "/run/model", memory=1 << 20), ModelHost(models["pf"], "/run/model.pf")
    async with trio.open_nursery() as nursery:
        for host in (vf, pf):
            nursery.start_soon(host.bus.serve)
        device = probe(vf, {})
        await device.open(OneCompanion(pf, nursery))
        yield HnsPlace(vf, device)
        await device.aclose()
        nursery.cancel_scope.cancel()


def make(folder: Path) -> bytes:
    with Served(folder / "m") as server, GuestMemory.of(MEMORY) as memory, server.connect(memory) as guest:
        guest.start()
        traffic = Traffic(guest, "zip", queues=4, timeout=SECONDS)
        traffic.run_entries(100)
        traffic.submit()
        guest.config.write(0x3C, 1, 11)
        guest.client.set_mig_state(MigState.STOP_COPY)
        return b"".join(save(guest.client))


GOLDEN = (Golden("hns", "zip", 1, place, make),)
