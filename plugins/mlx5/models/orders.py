"""Faults that a test orders, and the names they go by on the control socket.

    status:OPCODE:STATUS[:SYNDROME]    a command is not executed and answered so (numbers as Python writes them)
    delivery:OPCODE:STATUS             its entry comes back with this delivery status; `bad status` in the output too
    lost:OPCODE                        executed, but its entry is never given back
    bad-token                          the next entry comes back with another token
    bad-signature                      the next entry comes back with a signature that is wrong
    slow-save                          a SAVE takes SLOW_SECONDS longer
    page-stall                         a request for pages is never sent; what needs them waits
    page-starvation                    what needs pages fails with `no resources`
    initial                            a QUERY of a function that is tracked tells the state `init`
    bit-flip                           one bit of a saved image is wrong
    event-lost                         an event is not written to its queue
    tracker-error                      a report of dirty pages ends in the state `error`
    health:SYNDROME                    the PF's health buffer reports it and asks for a reset
    health-stuck                       the health counter does not advance (while ordered, -1 for always)
    firmware-dead                      all registers read as ones (while ordered)

OPCODE may be `any`. It must not know the commands.
"""

from vfu_server.model import Faults

SLOW_SECONDS = 10.0


class Orders(Faults):
    """The faults of a whole card: one book for the PF and its VFs."""

    def take_for(self, kind: str, opcode: int) -> list[int] | None:
        """The numbers behind the opcode of an ordered `kind` that is for this opcode; uses one up."""
        for name, left in list(self.armed.items()):
            head, *rest = name.split(":")
            if head != kind or not left or not rest:
                continue
            if rest[0] != "any" and _number(rest[0]) != opcode:
                continue
            self.take(name)
            return [_number(part) for part in rest[1:]]
        return None

    def health(self) -> int | None:
        """The syndrome of an ordered health error; uses it up."""
        for name, left in list(self.armed.items()):
            if left and name.startswith("health:"):
                self.armed[name] = 0
                return _number(name.partition(":")[2])
        return None

    def lasts(self, name: str) -> bool:
        """Whether `name` is ordered, for faults that are states."""
        return self.armed.get(name, 0) != 0


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return -1
