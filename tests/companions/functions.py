"""A PF with a mailbox and two VFs as one model process: what docs/plugins/companions.md drives. `python -m` runs it.

The PF answers SAVE by DMA: 256 bytes that tell how many commands there were. A VF's register counts what was written to
it. With the argument `pf` the PF stands alone.
"""

import sys

from vfu_server.model import Bar, Interrupts, Model
from vfu_server.model_server import main, main_functions
from vfu_server.pciconfig import PciConfig

VENDOR, PF, VF = 0x1AF4, 0x10F0, 0x10F1
ADDRESS, DOORBELL, STATUS, VF_DMA = 0x10, 0x18, 0x1C, 0x20
SAVE = 3


class Vf(Model):
    can_reset = True

    def __init__(self) -> None:
        super().__init__()
        self.bars, self.interrupts = {0: Bar(0x1000)}, Interrupts(msi=1)
        self.config = PciConfig(vendor=VENDOR, device=VF, class_code=0xFF0000)
        self.config.add_bar(0, 0x1000)
        self.config.add_msi(0x40, 1)
        self.value = 0

    def read(self, region, offset, width):
        return self.value & (1 << 8 * width) - 1

    def write(self, region, offset, width, value):
        self.value = value


class Pf(Model):
    can_reset = True

    def __init__(self, vfs) -> None:
        super().__init__()
        self.bars, self.interrupts = {0: Bar(0x1000)}, Interrupts()
        self.config = PciConfig(vendor=VENDOR, device=PF, class_code=0xFF0000)
        self.config.add_bar(0, 0x1000)
        self.vfs = vfs
        self.address, self.commands, self.status = 0, 0, 0

    def read(self, region, offset, width):
        return {STATUS: self.status, DOORBELL: self.commands}.get(offset, 0)

    def write(self, region, offset, width, value):
        if offset == ADDRESS:
            self.address = value
        elif offset == DOORBELL:
            self.status, self.commands = 1, self.commands + 1
            self.bus.call_later(0, lambda: self.run(value))
        elif offset == VF_DMA:  # through the first VF's bus, into its guest's memory
            self.bus.call_later(0, lambda: self.reach(value))

    def run(self, code):
        if self.faults.take("refuse"):
            self.status = 2
            return
        if code == SAVE:
            self.bus.dma_write(self.address, self.commands.to_bytes(4, "little") * 64)
        self.status = 0

    def reach(self, iova):
        vf = self.vfs[0]
        data = vf.bus.dma_read(iova, 4)
        vf.bus.dma_write(iova + 4, data)
        vf.value = int.from_bytes(data, "little")
        vf.bus.message(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pf"]:
        sys.exit(main(lambda: Pf([]), sys.argv[2:]))
    vf, second = Vf(), Vf()
    sys.exit(main_functions({"vf": vf, "pf": Pf([vf, second]), "vf2": second}, sys.argv[1:]))
