"""One block of error registers: of the queue manager or of the accelerator's core, as the PF shows them.

(model) Status is the source without the masked bits; nothing sets a source but an injection. It must not know where
the registers are.
"""

from collections.abc import Callable

ALL = 0xFFFFFFFF


class ErrorBlock:
    """`raised()` is called when the status becomes other than 0. `on`: ones of the mask switch errors on, not off."""

    def __init__(self, raised: Callable[[], None], *, on: bool = False) -> None:
        self._raised = raised
        self._on = on
        self.source = 0
        self.mask = ALL if on else 0

    def reset(self) -> None:
        """No error; everything is reported."""
        self.source = 0
        self.mask = ALL if self._on else 0

    @property
    def status(self) -> int:
        """What waits to be handled."""
        return self.source & (self.mask if self._on else ~self.mask & ALL)

    def inject(self, bits: int) -> None:
        """Errors happen."""
        before = self.status
        self.source |= bits
        if self.status & ~before:
            self._raised()

    def clear(self, bits: int) -> None:
        """A write of ones to the source."""
        self.source &= ~bits
