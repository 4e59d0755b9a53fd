"""`vfu-stream`: looks into a file with a device's saved state, or says whether it is sound.

It reads a stream in pieces, so that gigabytes need no memory. How things are printed is `stream_print`'s.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from vfu_server.cli_parser import Parser
from vfu_server.device import Section, StateIdentity
from vfu_server.errors import PluginError, StreamFormatError, VfuServerError
from vfu_server.libvfio_user.native import crc32c
from vfu_server.logs import plain
from vfu_server.stream import (
    Origin,
    SectionRecord,
    StreamEnd,
    StreamHeader,
    StreamItem,
    StreamReader,
    StreamSection,
)
from vfu_server.tools import stream_print
from vfu_server.tools.outcome import Outcome, end, place_error, tell

PROGRAM = "vfu-stream"
PIECE = 1 << 20
EPILOG = """\
examples:
  See what a saved state holds, section by section.
    vfu-stream inspect state.bin

  Check it in a script: every length, number and sum, the end record, and what its plugin says of its sections.
    vfu-stream verify state.bin && echo sound

exit codes:
    0  the stream is sound
    1  it is not; the error says at which byte, and what was expected there
    2  the command line cannot be meant
    3  the file cannot be read
"""


def build() -> argparse.ArgumentParser:
    """The parser."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s (inspect | verify) FILE",
        description="Look into a file with a device's saved state, as `vfu-migrate save` writes it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=("inspect", "verify"), help="print what is inside, or only check it")
    parser.add_argument("file", metavar="FILE", help="the saved state")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `vfu-stream`."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Do what the command line says; the exit code."""
    arguments = build().parse_args(argv)
    inspect = arguments.action == "inspect"
    look = Look(print if inspect else lambda _line: None)

    def work() -> Outcome:
        for piece in read_pieces(arguments.file):
            look.push(piece)
        look.finish()
        if not inspect:
            print(stream_print.summary(look.header, look.end))
        return Outcome.GOOD if look.sound else Outcome.BAD

    return end(PROGRAM, work)


def read_pieces(path: str) -> Iterator[bytes]:
    """The file, a piece at a time. Raises PlaceError."""
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except OSError as error:
        raise place_error("read", path, error) from error


class Look:
    """One stream, looked at as it comes; `show` takes the lines. `sound` is False once a section is not."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show
        self.sound = True
        self.header: StreamHeader | None = None
        self.end: StreamEnd | None = None
        self._configs = 0
        self._reader = StreamReader(crc32c, seen=self._seen)
        self._decoder = Decoder()
        self._starts: list[tuple[SectionRecord, int]] = []

    def push(self, piece: bytes) -> None:
        """Take bytes. Raises StreamFormatError, after showing what was sound before the fault."""
        try:
            self._reader.push(piece)
        finally:
            for item in self._reader.items:
                self._take(item)
            self._reader.items.clear()

    def finish(self) -> None:
        """No more bytes. Raises StreamFormatError if the stream is cut short."""
        try:
            self._reader.finish()
        finally:
            for record, position in self._starts:
                self.show(stream_print.section_line(record, position, "not complete"))
        if self._configs != 1:
            raise StreamFormatError(f"the stream has {self._configs} sections config of the server's, not 1")

    def _seen(self, record: SectionRecord, position: int) -> None:
        if record.offset == 0:
            self._starts.append((record, position))

    def _take(self, item: StreamItem) -> None:
        if isinstance(item, StreamHeader):
            self.header = item
            for line in stream_print.header_lines(item):
                self.show(line)
        elif isinstance(item, StreamEnd):
            self._show_skipped(None)
            self.end = item
            self.show(stream_print.end_line(item))
        else:
            self._show_skipped(item)
            record, position = self._starts.pop(0)
            self.show(stream_print.section_line(record, position, "sums right"))
            self._show_contents(item)

    def _show_skipped(self, until: StreamSection | None) -> None:
        """Padding that came before `until`: it is complete when what follows it is."""
        while self._starts and self._starts[0][0].padding and (until is not None or self._reader.complete):
            record, position = self._starts.pop(0)
            self.show(stream_print.section_line(record, position, "sums right"))

    def _show_contents(self, item: StreamSection) -> None:
        if self.header is None:
            return
        self._configs += item.origin is Origin.SERVER and item.section.tag == "config"
        try:
            lines = self._decoder.lines(self.header, item.origin, item.section)
        except VfuServerError as error:
            self.sound = False
            error.add_note(f"in section {item.section.tag!r}, whose sums are right")
            tell(PROGRAM, error)
            return
        for line in lines:
            self.show(f"    {plain(line)}")


class Decoder:
    """What sections say: the server's own, and a plugin's if it is installed and can tell."""

    def __init__(self) -> None:
        self._ask: Callable[[StateIdentity, Section], list[str] | None] | None = None
        self._silent = ""

    def lines(self, header: StreamHeader, origin: Origin, section: Section) -> list[str]:
        """Lines for people. Raises StreamFormatError for contents that cannot be."""
        if origin is Origin.SERVER:
            return _server_section(section)
        if self._ask is None and not self._silent:
            self._find(header.plugin)
        told = self._ask(header.state, section) if self._ask is not None else None
        if told is None:
            return [self._silent or f"the plugin {header.plugin!r} does not tell what is in it"]
        return told

    def _find(self, name: str) -> None:
        from vfu_server.plugins import Plugins

        plugins = Plugins()
        try:
            plugin = plugins.load(name)
        except PluginError as error:
            self._silent = f"not decoded: {error}"
            return
        self._ask = lambda identity, section: plugins.decode(plugin, identity, section)


def _server_section(section: Section) -> list[str]:
    if section.tag != "config" or section.version != 1:
        if section.optional:
            return ["a section that this version does not know and skips"]
        raise StreamFormatError(f"a required section of the server's that this version does not know: {section.tag!r}")
    if len(section.payload) not in (256, 4096):
        raise StreamFormatError(f"config space of {len(section.payload)} bytes, not 256 or 4096")
    return stream_print.config_lines(section.payload)


if __name__ == "__main__":
    main()
