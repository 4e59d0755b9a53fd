"""The virtual function of scripted firmware, as its guest has it."""

from tests.plugins.fake_host import FakeHost
from tests.plugins.mlx5.firmware import FakeConnectx


class FakeVf(FakeHost):
    """The virtual function as its guest has it."""

    bar_size = 0x100000
    ids = (0x15B3, 0x101E, 0x00)

    def __init__(self, pf: FakeConnectx, name="/run/model"):
        super().__init__(name)
        self.pf = pf
        self.can_reset = True
        self.migration = None
        self.iova_ranges = ()

    def bar_read(self, offset, width):
        return self.pf.bar_read(offset, width)

    async def reset(self):
        if self.reset_error:
            raise self.reset_error
        self.resets += 1
        self.pf.stopped.clear()
        self.pf.tracking, self.pf.rest = False, None
        return "function"
