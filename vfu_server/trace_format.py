"""The file of `--trace-regions`: a header that says what was traced, then records of 40 bytes, one for each access.

C writes the records (csrc/trace.h has the same layout). It must not know who reads them or what an access means. A file
may be anybody's: everything in it is checked, and nothing in it names code to run.
"""

import enum
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import BinaryIO, Self

from vfu_server.errors import VfuServerError
from vfu_server.policy import Answer, StateClass
from vfu_server.uapi import MAX_DATA_XFER_SIZE

MAGIC = b"VFUTRACE"
VERSION = 1
HEAD = struct.Struct("<8sHHI")
"""Magic, version, bytes of a record, bytes of the whole header; JSON fills the rest of the header."""
RECORD = struct.Struct("<QQQIIHBBBB2x")
"""Time, offset, value, width, took, errno, region, kind, answer, state class."""
MAX_HEADER = 64 << 10
CHUNK = RECORD.size * 8192
NUM_REGIONS = 9


class TraceError(VfuServerError):
    """A file is no trace, or not one that can be read; the message names the place."""


class Kind(enum.IntEnum):
    """What a record is."""

    READ = 0
    WRITE = 1
    MORE = 2
    """Eight further bytes of the access before."""
    LOST = 3
    """So many accesses (`value`) found no room in the ring here."""
    CLIENT = 4
    """A client has negotiated."""
    RESET = 5
    """The device was reset."""


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What was traced. `mapped`: (region, offset, size) of the areas that clients could map, whose accesses nobody saw.

    `wall_ns` (since 1970, UTC) and `monotonic_ns` are the same moment on two clocks; records have the second one.
    """

    server: str
    device: str
    plugin: str
    variant: str
    vendor: int
    device_id: int
    wall_ns: int
    monotonic_ns: int
    mapped: Sequence[tuple[int, int, int]] = field(default=())

    def pack(self) -> bytes:
        """As it stands at the begin of the file."""
        text = json.dumps(asdict(self)).encode()
        return HEAD.pack(MAGIC, VERSION, RECORD.size, HEAD.size + len(text)) + text


@dataclass(frozen=True, slots=True)
class Access:
    """One access. `number` counts from 0; `data`: all bytes written or read, none for a read that failed.

    `time_ns` is the monotonic time when it began, `took_ns` how long the answer took, `errno` that of the answer or 0.
    """

    number: int
    time_ns: int
    took_ns: int
    write: bool
    region: int
    offset: int
    width: int
    data: bytes
    answer: Answer
    state_class: StateClass
    errno: int

    @property
    def value(self) -> int:
        """The data as a little-endian number."""
        return int.from_bytes(self.data, "little")


@dataclass(frozen=True, slots=True)
class Mark:
    """Something between accesses: kind LOST (`count` accesses are missing), CLIENT or RESET."""

    kind: Kind
    time_ns: int
    count: int = 0


def is_trace(path: Path) -> bool:
    """Whether a file begins as a trace does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class TraceReader:
    """A trace in a file, read from its begin to its end as it was when it was opened."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Raises TraceError for a header that is not one of ours."""
        self._file = file
        self._name = name
        self._at = 0
        self.header = self._header()
        self.lost = 0
        """Accesses that `entries` found to be missing."""
        self.cut_short = False
        """The last record is not there in full: the file is still written, or its writer was killed."""

    @classmethod
    def open(cls, path: str) -> "TraceReader":
        """Open and check a file; it stays open until the reader is closed. Raises TraceError."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TraceError(f"{path}: {error.strerror}", error.errno) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise TraceError(f"{path} is no regular file")
        file = os.fdopen(fd, "rb")
        try:
            return cls(file, path)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entries(self) -> Iterator[Access | Mark]:
        """Everything in the file, in order. Raises TraceError for a record that cannot be meant."""
        number = 0
        begun: Access | None = None
        data = bytearray()
        for time_ns, offset, value, width, took, errno, region, kind, answer, state_class in self._records():
            if kind == Kind.MORE:
                if begun is None:
                    raise self._wrong("further bytes of no access")
                data += value.to_bytes(8, "little")[: begun.width - len(data)]
                if len(data) == begun.width:
                    yield replace(begun, data=bytes(data))
                    begun = None
                continue
            if begun is not None:
                raise self._wrong(f"an access of {begun.width} bytes has only {len(data)}")
            if kind in (Kind.LOST, Kind.CLIENT, Kind.RESET):
                mark = Mark(Kind(kind), time_ns, value if kind == Kind.LOST else 0)
                self.lost += mark.count
                yield mark
                continue
            if kind not in (Kind.READ, Kind.WRITE):
                raise self._wrong(f"unknown kind {kind}")
            self._check(region, width, answer, state_class)
            write = kind == Kind.WRITE
            first = b"" if errno and not write else value.to_bytes(8, "little")[:width]
            access = Access(
                number, time_ns, took, write, region, offset, width, first,
                Answer(answer), StateClass(state_class), errno,
            )  # fmt: skip
            number += 1
            if 0 < len(first) < width:
                begun, data = access, bytearray(first)
            else:
                yield access
        self.cut_short = self.cut_short or begun is not None

    def _check(self, region: int, width: int, answer: int, state_class: int) -> None:
        if region >= NUM_REGIONS or not 0 < width <= MAX_DATA_XFER_SIZE:
            raise self._wrong(f"no access has region {region} and {width} bytes")
        if answer >= len(Answer) or state_class >= len(StateClass):
            raise self._wrong(f"unknown answer {answer} or state class {state_class}")

    def _records(self) -> Iterator[tuple[int, ...]]:
        while True:
            chunk = self._file.read(CHUNK)
            whole = len(chunk) - len(chunk) % RECORD.size
            for record in RECORD.iter_unpack(memoryview(chunk)[:whole]):
                yield record
                self._at += RECORD.size
            if len(chunk) < CHUNK:
                self.cut_short = whole != len(chunk)
                return

    def _header(self) -> TraceHeader:
        head = self._file.read(HEAD.size)
        if len(head) < HEAD.size or not head.startswith(MAGIC):
            raise TraceError(f"{self._name} is no trace of --trace-regions")
        _, version, record_size, size = HEAD.unpack(head)
        if version != VERSION or record_size != RECORD.size:
            raise TraceError(f"{self._name} is a trace of format {version}, this program reads format {VERSION}")
        if not HEAD.size < size <= MAX_HEADER:
            raise TraceError(f"{self._name}: a header of {size} bytes")
        text = self._file.read(size - HEAD.size)
        self._at = size
        try:
            return _header_from(json.loads(text))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TraceError(f"{self._name}: the header cannot be read: {error}") from None

    def _wrong(self, what: str) -> TraceError:
        return TraceError(f"{self._name}: {what}, at byte {self._at:#x}")


def _header_from(found: Mapping[str, object]) -> TraceHeader:
    """Checked by kind. Fields that are not known are left out: a later version may say more."""
    given: dict[str, object] = {}
    for each in fields(TraceHeader):
        value = found[each.name]
        if each.name == "mapped":
            value = _areas(value)
        elif type(value) is not each.type:
            raise TypeError(f"{each.name} is {value!r}")
        given[each.name] = value
    return TraceHeader(**given)  # type: ignore[arg-type]  # each was checked above


def _areas(value: object) -> tuple[tuple[int, int, int], ...]:
    if not isinstance(value, list) or not all(isinstance(area, list) and len(area) == 3 for area in value):
        raise TypeError(f"mapped is {value!r}")
    areas = [(region, offset, size) for region, offset, size in value]
    if not all(type(number) is int for area in areas for number in area):
        raise TypeError(f"mapped is {value!r}")
    return tuple(areas)
