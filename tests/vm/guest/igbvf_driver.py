"""A driver for a virtual function of igb through our client: its mailbox to the card's driver, and its interrupts.

Registers are those of the 82576 datasheet, 8.29 (virtual function). It knows nothing of the server below.
"""

import time
from collections.abc import Callable

from vfu_server.testing import Guest

CONTROL, MAILBOX, MAILBOX_MEMORY = 0x0000, 0x0C40, 0x0800
CAUSE_SET, MASK_SET, CAUSE, VECTOR_OF_MAILBOX = 0x1520, 0x1524, 0x1580, 0x1740
RECEIVE_QUEUE = 0x2828
RESET, QUEUE_ENABLED = 1 << 26, 1 << 25
REQUEST, ACKNOWLEDGE, OURS, FROM_CARD, CARD_ACKNOWLEDGED = 0x01, 0x02, 0x04, 0x10, 0x20
VALID = 0x80
RESET_MESSAGE, GOOD = 0x01, 0x80000000


class IgbvfDriver:
    """A virtual function in BAR 0 of a guest that has started."""

    def __init__(self, guest: Guest, seconds: float) -> None:
        self.guest = guest
        self.seconds = seconds
        self._told = 0
        """Bits of the mailbox that reading has cleared and nobody has looked for yet."""

    def read(self, register: int) -> int:
        """A register."""
        return self.guest.read(0, register, 4)

    def write(self, register: int, value: int) -> None:
        """Write a register."""
        self.guest.write(0, register, 4, value)

    def hello(self) -> bytes:
        """Reset, and tell the card's driver so, which answers with the function's hardware address."""
        self.write(CONTROL, self.read(CONTROL) | RESET)
        self._wait(self._take_mailbox, "the mailbox was not to be had")
        self._told = 0
        self.write(MAILBOX_MEMORY, RESET_MESSAGE)
        self.write(MAILBOX, REQUEST)
        self._wait(lambda: self._seen(CARD_ACKNOWLEDGED), "the card's driver did not take the message")
        self._wait(lambda: self._seen(FROM_CARD), "the card's driver did not answer")
        answer = [self.read(MAILBOX_MEMORY + 4 * word) for word in range(3)]
        self.write(MAILBOX, ACKNOWLEDGE)
        if answer[0] & 0xFFFF != RESET_MESSAGE or not answer[0] & GOOD:
            raise AssertionError(f"the card's driver answered {answer[0]:#x}")
        return b"".join(word.to_bytes(4, "little") for word in answer[1:])[:6]

    def fire(self, vector: int) -> None:
        """Have the function send the message of one vector, which it does for a cause that was not there before."""
        self.write(CAUSE, 1 << vector)
        self.write(MASK_SET, 1 << vector)
        self.write(CAUSE_SET, 1 << vector)

    def mailbox_interrupt(self, vector: int) -> None:
        """Messages of the card's driver come by `vector`."""
        self.write(VECTOR_OF_MAILBOX, VALID | vector)
        self.write(MASK_SET, 7)

    def _take_mailbox(self) -> bool:
        self.write(MAILBOX, OURS)
        return bool(self.read(MAILBOX) & OURS)

    def _seen(self, bit: int) -> bool:
        """A bit that reading clears, and another one with it."""
        self._told |= self.read(MAILBOX)
        seen, self._told = bool(self._told & bit), self._told & ~bit
        return seen

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.seconds
        while not done():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} within {self.seconds:g} s")
