"""A state on its way in: its bytes are kept, and the match part is checked as soon as it is complete.

It writes nothing to the device. Each session has a new one, so a check that was passed once lets nothing else pass.
"""

import errno
from collections.abc import Awaitable, Callable

from plugins.hns.blob import MATCH_SIZE, SIZE, Match, State, decode_match, decode_state, ring_address
from vfu_server.errors import StreamFormatError

Check = Callable[[Match], Awaitable[None]]


class Loading:
    """One session. `check` raises StreamMismatchError."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._data = b""
        self._match: Match | None = None
        self.mailbox: bytes | None = None
        """What the guest is to read of its last mailbox command, if the state tells."""

    async def add(self, data: bytes) -> None:
        """The next bytes of the blob, in any pieces. StreamFormatError, StreamMismatchError."""
        if len(self._data) + len(data) > SIZE:
            raise StreamFormatError(f"the state is longer than {SIZE} bytes", errno.ENOMEM)
        self._data += data
        if self._match is None and len(self._data) >= MATCH_SIZE:
            match = decode_match(self._data)
            await self._check(match)
            self._match = match

    def result(self) -> tuple[Match, State | None]:
        """The whole state; no State for a function whose guest has no driver loaded.

        StreamFormatError: it is not complete, or contradicts itself.

        A state whose match part was never checked is not given out.
        """
        if self._match is None:
            raise StreamFormatError(f"the state has {len(self._data)} bytes, not the {MATCH_SIZE} of a match part")
        if len(self._data) == MATCH_SIZE:
            return self._match, None
        state = decode_state(self._data)
        # Told twice, and only the contexts are written: a wrong one could not be seen in the hardware.
        for name, address, context in (("EQEs", state.eqe, state.eqc), ("AEQEs", state.aeqe, state.aeqc)):
            if address != (other := ring_address(context)):
                raise StreamFormatError(f"the {name} are at {address:#x} and, by their context, at {other:#x}")
        return self._match, state
