"""The PCI functions: config space, BAR 0 and what lies where in it, for the PF and for each VF.

What is behind the registers is the card's. It must not know sockets.

    PF   0x00000  initialization segment     0x10000..0xdffff  doorbell pages     0xe0000  MSI-X table, 0xe1000 pending
    VF   0x00000  initialization segment     0x10000  engine   0x20000..0x23fff  doorbell pages of its pairs
         0x40000  MSI-X table, 0x41000 pending
"""

import zlib
from collections.abc import Mapping
from typing import Any

from plugins.mlx5.models.card import VECTORS, Card
from plugins.mlx5.models.commands_boot import VfCommands
from plugins.mlx5.models.commands_eswitch import OwnVportCommands
from plugins.mlx5.models.engine import PAIRS, Engine
from plugins.mlx5.models.firmware import Firmware, Stage
from plugins.mlx5.models.options import Options
from plugins.mlx5.models.queue import CommandQueue
from plugins.mlx5.models.segment import Segment
from plugins.mlx5.models.vhca import Function, Vhca
from plugins.mlx5.registers import INIT_SEGMENT_SIZE
from vfu_server.model import Bar, Bus, Interrupts, Model
from vfu_server.pciconfig import PciConfig

VENDOR = 0x15B3
VF_DEVICE = 0x101E
BAR_SIZE = 1 << 20
CLASS_ETHERNET = 0x020000
PF_MSIX_TABLE, PF_MSIX_PBA = 0xE0000, 0xE1000
VF_MSIX_TABLE, VF_MSIX_PBA = 0x40000, 0x41000
VF_VECTORS = 8
ENGINE, VF_DOORBELLS = 0x10000, 0x20000
PAGE = 0x1000
UAR_CQ, UAR_EQ_ARM, UAR_EQ = 0x20, 0x40, 0x48


def config_space(device: int, vectors: int, table: int, pba: int) -> PciConfig:
    """What both kinds of function have."""
    config = PciConfig(vendor=VENDOR, device=device, class_code=CLASS_ETHERNET, subsystem_vendor=VENDOR, subsystem=0x23)
    config.add_bar(0, BAR_SIZE, wide=True, prefetchable=True)
    config.add_express(0x60)
    config.add_msix(0x9C, vectors, table=(0, table), pba=(0, pba))
    config.add_power_management(0x40)
    return config


class PfModel(Model):
    """The PF."""

    can_reset = True

    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card
        self.faults = card.orders
        self.bars = {0: Bar(BAR_SIZE, wide=True, prefetchable=True)}
        self.interrupts = Interrupts(msix=VECTORS)
        self.config = config_space(card.options.device_id, VECTORS, PF_MSIX_TABLE, PF_MSIX_PBA)
        self._queue = CommandQueue(
            lambda: self.bus,
            lambda request: card.firmware.execute(self._queue, request),
            card.command_finished,
            card.orders,
            card.violations,
        )
        self._segment = Segment(
            lambda: self.bus,
            self._queue,
            card.options,
            card.orders,
            card.violations,
            ready=lambda: True,
            restart=self.reset,
            heeds_health=True,
        )
        self._cq_value = 0
        card.queue, card.segment = self._queue, self._segment

    def plug(self, bus: Bus) -> None:
        """Power on."""
        super().plug(bus)
        self._segment.reset()

    def read(self, region: int, offset: int, width: int) -> int:
        """The initialization segment; doorbell pages read 0."""
        return self._segment.read(offset, width) if offset < INIT_SEGMENT_SIZE else 0

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """The initialization segment, or a doorbell."""
        if offset < INIT_SEGMENT_SIZE:
            self._segment.write(offset, width, value)
            return
        card, page, at = self._card, offset // PAGE, offset % PAGE
        if not card.has_uar(page) or card.stage is not Stage.READY or width not in (4, 8):
            card.violations.note("uar", f"a write of {width} bytes at {offset:#x}")
            return
        data = value.to_bytes(width, "little")
        first, second = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:], "big")
        if at in (UAR_EQ_ARM, UAR_EQ) and width == 4:
            card.events.doorbell(page, first, arm=at == UAR_EQ_ARM)
        elif at == UAR_CQ and width == 8:
            card.transport.arm(page, first, second)
        elif at == UAR_CQ:
            self._cq_value = first
        elif at == UAR_CQ + 4 and width == 4:
            card.transport.arm(page, self._cq_value, first)
        else:
            card.violations.note("uar", f"a write of {width} bytes at {offset:#x}")

    def reset(self) -> None:
        """FLR, DEVICE_RESET, or by the nic interface."""
        self._card.reset()

    def bus_reset(self) -> None:
        """The client has gone."""
        self.reset()

    def state(self) -> Mapping[str, int]:
        """Everything that the card counts."""
        found = self._card.numbers()
        found["health"] = self._segment.syndrome
        found["commands"] = self._queue.executed
        return found


class VfModel(Model):
    """VF `vhca.index`."""

    can_reset = True

    def __init__(self, card: Card, vhca: Vhca) -> None:
        super().__init__()
        self._card = card
        self._vhca = vhca
        self._garbage = 0
        self.faults = card.orders
        self.bars = {0: Bar(BAR_SIZE, wide=True, prefetchable=True)}
        self.interrupts = Interrupts(msix=VF_VECTORS)
        self.config = config_space(VF_DEVICE, VF_VECTORS, VF_MSIX_TABLE, VF_MSIX_PBA)
        firmware = Firmware(lambda: Stage.READY, card.orders, card.guests)
        queue = CommandQueue(
            lambda: self.bus,
            lambda request: firmware.execute(queue, request),
            lambda _: None,
            card.orders,
            card.guests,
        )
        segment = Segment(
            lambda: self.bus,
            queue,
            card.options,
            card.orders,
            card.guests,
            ready=lambda: vhca.enabled,
            restart=self.reset,
        )
        engine = Engine(
            lambda: self.bus,
            card.guests,
            vhca.touch,
            lambda iova, length: card.tracker.wrote(vhca.vhca_id, iova, length),
            lambda: self.config.bus_master,
        )
        number = vhca.function_id

        def want(wanted: Mapping[str, Any]) -> None:
            card.vport_wants(number, wanted)

        vhca.function = parts = Function(segment, queue, engine, lambda: card.eswitch.vport(number).wanted(), want)
        firmware.add(OwnVportCommands(lambda: card.eswitch.vport(number), want).commands())
        firmware.add(
            VfCommands(
                card.options, vhca.caps, lambda: parts.issi, lambda issi: setattr(parts, "issi", issi)
            ).commands()
        )
        self._parts = parts

    def plug(self, bus: Bus) -> None:
        """Power on."""
        super().plug(bus)
        self._parts.segment.reset()

    def read(self, region: int, offset: int, width: int) -> int:
        """Registers; garbage while the responder is stopped."""
        if self._vhca.responder_stopped:
            self._garbage += 1
            seed = f"{offset}:{self._garbage}".encode()
            return (zlib.crc32(seed) | zlib.crc32(seed[::-1]) << 32) & ((1 << 8 * width) - 1)
        if offset < INIT_SEGMENT_SIZE:
            return self._parts.segment.read(offset, width)
        if ENGINE <= offset < ENGINE + PAGE and width in (4, 8) and offset % 4 == 0 and self._vhca.enabled:
            words = (self._parts.engine.read(at - ENGINE) for at in range(offset, offset + width, 4))
            return int.from_bytes(b"".join(word.to_bytes(4, "big") for word in words), "little")
        return 0

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """Registers and doorbells; dropped while the responder is stopped."""
        if self._vhca.responder_stopped:
            return
        if offset < INIT_SEGMENT_SIZE:
            self._parts.segment.write(offset, width, value)
            return
        inside = ENGINE <= offset < ENGINE + PAGE or VF_DOORBELLS <= offset < VF_DOORBELLS + PAIRS * PAGE
        if not inside or not self._vhca.enabled or width not in (4, 8) or offset % 4:
            self._card.guests.note("engine", f"a write of {width} bytes at {offset:#x} of VF {self._vhca.index}")
            return
        data = value.to_bytes(width, "little")
        for at in range(0, width, 4):
            word, place = int.from_bytes(data[at : at + 4], "big"), offset + at
            if place < ENGINE + PAGE:
                self._parts.engine.write(place - ENGINE, word)
            else:
                self._parts.engine.doorbell((place - VF_DOORBELLS) // PAGE, place % PAGE, word)

    def reset(self) -> None:
        """FLR or DEVICE_RESET."""
        self._card.reset_vhca(self._vhca)

    def bus_reset(self) -> None:
        """The client has gone."""
        self.reset()

    def state(self) -> Mapping[str, int]:
        """The engine, and what the card counts."""
        return {
            **self._card.violations.numbers(),
            **self._card.guests.numbers(),
            **self._parts.engine.numbers(),
            "vhca_id": self._vhca.vhca_id,
        }


def functions(options: Options, seed: str) -> dict[str, Model]:
    """The functions of a new card by their names on sockets: VF 0 first, then the PF, then further VFs."""
    found: dict[str, Model] = {}
    card = Card(options, seed, lambda: found["pf"].bus)
    pf = PfModel(card)
    vfs = [VfModel(card, vhca) for vhca in card.vhcas]
    found["vf0"] = vfs[0]
    found["pf"] = pf
    found.update({f"vf{index}": model for index, model in enumerate(vfs[1:], 1)})
    return found
