"""The state of a function as the kernel's driver writes it: 176 bytes, little-endian, of which 40 go first.

It touches no device, and must not know who carries the bytes. Source: hisi_acc_vfio_pci.h (struct acc_vf_data); the
offsets were printed by a compiler.
"""

import struct
from dataclasses import dataclass, replace
from typing import Final

from vfu_server.errors import StreamFormatError

MAGIC_V1: Final = 0xCDCDCDCDFEEDAACC
MAGIC_V2: Final = 0xAACCFEEDDECADEDE
MAJOR: Final = 1
MINOR: Final = 0

_MATCH = struct.Struct("<Q5I2H8x")
_STATE = struct.Struct("<6I7I7I20x4x4Q")
MATCH_SIZE: Final = _MATCH.size
"""Bytes of the match part; all that there is for a function whose guest has no driver loaded."""
SIZE: Final = _MATCH.size + _STATE.size
READY: Final = 0
NOT_READY: Final = 1


@dataclass(frozen=True, slots=True)
class Match:
    """The match part: what both sides must have alike. `state` READY or NOT_READY; `major` is 0 with V1's magic."""

    queues: int
    device: int
    isolation: int
    first_queue: int
    state: int = READY
    magic: int = MAGIC_V2
    major: int = MAJOR
    minor: int = MINOR

    def encode(self) -> bytes:
        """40 bytes."""
        return _MATCH.pack(
            self.magic,
            self.queues,
            self.device,
            self.isolation,
            self.first_queue,
            self.state,
            self.major,
            self.minor,
        )


@dataclass(frozen=True, slots=True)
class State:
    """The rest: registers by their place in the blob, contexts as seven words, and four IOVAs of the guest's."""

    aeq_int_mask: int
    eq_int_mask: int
    ifc_int_source: int
    ifc_int_mask: int
    ifc_int_set: int
    page_size: int
    eqc: tuple[int, ...]
    aeqc: tuple[int, ...]
    eqe: int
    aeqe: int
    sqc: int
    cqc: int

    def encode(self) -> bytes:
        """136 bytes."""
        return _STATE.pack(
            self.aeq_int_mask,
            self.eq_int_mask,
            self.ifc_int_source,
            self.ifc_int_mask,
            self.ifc_int_set,
            self.page_size,
            *self.eqc,
            *self.aeqc,
            self.eqe,
            self.aeqe,
            self.sqc,
            self.cqc,
        )

    @property
    def has_queues(self) -> bool:
        """All four addresses are set; with one of them 0 the kernel's driver restores nothing."""
        return all((self.eqe, self.aeqe, self.sqc, self.cqc))


def decode_match(data: bytes) -> Match:
    """The match part of `data`. StreamFormatError for another magic or version; the minor one may be any."""
    if len(data) < MATCH_SIZE:
        raise StreamFormatError(f"the match part has {len(data)} bytes, less than {MATCH_SIZE}")
    magic, queues, device, isolation, first, state, major, minor = _MATCH.unpack_from(data)
    if magic not in (MAGIC_V1, MAGIC_V2):
        raise StreamFormatError(f"the match part begins with {magic:#x}, known are {MAGIC_V2:#x} and {MAGIC_V1:#x}")
    if magic == MAGIC_V1:
        major = minor = 0  # three reserved words
    elif major != MAJOR:
        raise StreamFormatError(f"the state has version {major}.{minor}, known is {MAJOR}")
    if state not in (READY, NOT_READY):
        raise StreamFormatError(f"the function's state is {state:#x}, known are {READY} (ready) and {NOT_READY}")
    return Match(queues, device, isolation, first, state, magic, major, minor)


def decode_state(data: bytes) -> State:
    """The part behind the match part, of all 176 bytes. StreamFormatError for another length.

    V1 wrote wrong addresses of EQEs and AEQEs: they are taken from the context words.
    """
    match = decode_match(data)
    if len(data) != SIZE:
        raise StreamFormatError(f"the state has {len(data)} bytes, not {SIZE}, nor {MATCH_SIZE} for an unused function")
    values = _STATE.unpack_from(data, MATCH_SIZE)
    aeq_mask, eq_mask, ifc_source, ifc_mask, ifc_set, page_size = values[:6]
    eqe, aeqe, sqc, cqc = values[20:]
    eqc, aeqc = values[6:13], values[13:20]
    state = State(aeq_mask, eq_mask, ifc_source, ifc_mask, ifc_set, page_size, eqc, aeqc, eqe, aeqe, sqc, cqc)
    if match.magic == MAGIC_V1:
        return replace(state, eqe=ring_address(state.eqc), aeqe=ring_address(state.aeqc))
    return state


def ring_address(context: tuple[int, ...]) -> int:
    """IOVA of the ring that the words of EQC or AEQC describe."""
    return context[2] << 32 | context[1]
