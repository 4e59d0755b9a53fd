"""The accelerator as a whole: what its PF and VFs share. Queue ranges, messages, errors, the migration mode.

Start values are those behind a PF driver that has done its work (queues assigned, mode set), so that a VF can be used
without anybody at the PF (model). It must not know registers.
"""

from collections.abc import Callable

from plugins.hns.models.generation import MOST_QUEUES, Order
from plugins.hns.models.messages import Messages
from plugins.hns.models.ras import ErrorBlock
from plugins.hns.models.vft import Range, Vft


class Shared:
    """State of the device that belongs to no single function."""

    def __init__(self, order: Order) -> None:
        self.order = order
        firsts = [order.pf_queues + index * order.queues for index in range(order.vfs)]
        self.vft = Vft([Range(0, order.pf_queues), *(Range(first, order.queues) for first in firsts)], MOST_QUEUES)
        self.messages = Messages(order.vfs)
        self.on_error: Callable[[], None] = _nobody
        """The PF's abnormal interrupt."""
        self.on_message: Callable[[], bool] = _nobody_there
        """A VF has said something; whether somebody at the PF hears it."""
        self.qm_errors = ErrorBlock(self._error)
        self.core_errors = ErrorBlock(self._error, on=order.kind.name == "sec")
        self.pf_ctrl = order.pf_ctrl
        self.doorbell_drop = 0
        """A bit for each function whose doorbells are dropped (V5)."""

    def reset(self) -> None:
        """Start values."""
        self.vft.reset()
        self.messages.reset()
        self.qm_errors.reset()
        self.core_errors.reset()
        self.pf_ctrl = self.order.pf_ctrl
        self.doorbell_drop = 0

    def _error(self) -> None:
        self.on_error()


def _nobody() -> None:
    return None


def _nobody_there() -> bool:
    return False
