"""A section of this plugin's in words, without a device: for people who look into a stream.

The blob may come in two sections, the match part first.
"""

from collections.abc import Iterator

from plugins.hns.blob import MATCH_SIZE, NOT_READY, SIZE, Match, State, decode_match, decode_state
from plugins.hns.device import MAILBOX_VERSION, TAG_MAILBOX
from plugins.hns.registers import CONTEXT_WORDS, FUNCTION, KIND_OF_VF, MAILBOX_SIZE, VF
from vfu_server.device import Section
from vfu_server.errors import StreamFormatError
from vfu_server.kernel_migration import SECTION_VERSION, TAG

REST = SIZE - MATCH_SIZE
_ANY_MATCH = Match(0, 0, 0, 0).encode()
"""In front of a second section that is looked at by itself. It is V2's, so the addresses are shown as they are."""


def decode(section: Section) -> Iterator[str]:
    """Lines for one section. Raises StreamFormatError for what no version of this plugin has written."""
    if (section.tag, section.version) == (TAG_MAILBOX, MAILBOX_VERSION):
        return _mailbox(section.payload)
    if (section.tag, section.version) != (TAG, SECTION_VERSION):
        raise StreamFormatError(f"unknown section {section.tag!r} version {section.version}")
    data = section.payload
    if len(data) == REST:
        return _state(decode_state(_ANY_MATCH + data))
    if len(data) == MATCH_SIZE:
        return _match(decode_match(data))
    return iter((*_match(decode_match(data)), *_state(decode_state(data))))


def _match(match: Match) -> Iterator[str]:
    kind = KIND_OF_VF.get(match.device)
    name = "unknown device" if kind is None else f"{kind.name} VF"
    version = f"version {match.major}.{match.minor}"
    yield f"{name} {match.device:#06x}, {match.queues} queues from {match.first_queue} on, {version}"
    yield f"queue isolation {match.isolation:#x}, {'not ready' if match.state == NOT_READY else 'ready'}"


def _state(state: State) -> Iterator[str]:
    for name in ("aeq_int_mask", "eq_int_mask", "ifc_int_source", "ifc_int_mask", "ifc_int_set", "page_size"):
        yield VF[name].decode(getattr(state, name))
    for i in range(CONTEXT_WORDS):
        yield VF[f"eqc{i}"].decode(state.eqc[i])
    for i in range(CONTEXT_WORDS):
        yield VF[f"aeqc{i}"].decode(state.aeqc[i])
    yield f"EQEs at iova {state.eqe:#x}, AEQEs at iova {state.aeqe:#x}"
    yield f"table of SQ contexts at iova {state.sqc:#x}, of CQ contexts at iova {state.cqc:#x}"


def _mailbox(data: bytes) -> Iterator[str]:
    if len(data) != MAILBOX_SIZE:
        raise StreamFormatError(f"section {TAG_MAILBOX} has {len(data)} bytes, not {MAILBOX_SIZE}")
    for i in range(4):
        yield FUNCTION[f"mailbox{i}"].decode(int.from_bytes(data[4 * i : 4 * i + 4], "little"))
