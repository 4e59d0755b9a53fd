"""`vfu-trace`: shows the files of `--trace-regions`, and replays them against a device or model behind a socket.

It must not know how: `trace_show` and `trace_replay` do it. Imports are put off until they are needed.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from vfu_server import cli_parser, logs
from vfu_server.errors import HostError, PluginError, UsageError, VfuServerError
from vfu_server.exit_codes import ExitCode, exit_code

if TYPE_CHECKING:
    from vfu_server.regmap import Block
    from vfu_server.testing.client import Client
    from vfu_server.trace_format import TraceHeader, TraceReader
    from vfu_server.trace_replay import Outcome, Replay
    from vfu_server.trace_show import Printer

SAME = 0
DIFFERENT = 1
MAX_MEMORY = 1 << 20
EPILOG = """\
examples:
  Take a trace of everything that a client does.
    vfu-server --plugin generic_dmaq --model edu --mmap never --trace-regions /tmp/edu.trace

  Read it, with the names of registers and fields.
    vfu-trace show /tmp/edu.trace

  Does another model, or a changed one, answer alike?
    vfu-trace replay /tmp/edu.trace /tmp/other.sock --ignore BAR0+0x20:4

exit codes: 0 done, or every read alike; 1 replay: some are not; 2 usage; 3 the file is no sound trace; 4 the device
cannot be reached or is another one.
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `vfu-trace`."""
    code = run(list(sys.argv[1:] if argv is None else argv))
    sys.stdout.flush()
    sys.exit(code)


def build() -> argparse.ArgumentParser:
    """The parser."""
    parser = cli_parser.Parser(
        prog="vfu-trace",
        description="Show what vfu-server --trace-regions has written, or do it again elsewhere and compare.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="show | replay", parser_class=cli_parser.Parser
    )
    show = actions.add_parser("show", help="print a trace", allow_abbrev=False)
    show.add_argument("--json", action="store_true", help="one JSON object a line")
    replay = actions.add_parser("replay", help="send a trace's accesses to a device and compare", allow_abbrev=False)
    for each in (show, replay):
        each.add_argument("file", metavar="FILE", help="what --trace-regions has written; it may still be written")
        each.add_argument(
            "--plugin", metavar="NAME", help="take register names from this plugin (default: the traced device's)"
        )
        each.add_argument("--option", metavar="K=V", action="append", default=[], help="an option of the plugin")
    replay.add_argument("socket", metavar="SOCKET", help="a vfio-user server: a model's, or vfu-server's own")
    replay.add_argument("--fast", action="store_true", help="leave out the pauses (else those over a second are cut)")
    replay.add_argument(
        "--memory", metavar="MIB", type=int, default=0, help="map so much empty guest memory at 0 for the device's DMA"
    )
    replay.add_argument(
        "--ignore",
        metavar="PLACE",
        action="append",
        default=[],
        help="REGION+OFFSET[:LENGTH] where reads may differ, for instance BAR0+0x24:4; repeat it for several",
    )
    replay.add_argument("--limit", metavar="N", type=int, default=20, help="print the first N differences (default 20)")
    return parser


def run(argv: list[str]) -> int:
    """Do what the command line says; the exit code."""
    arguments = build().parse_args(argv)
    logs.configure("warning", "text")
    from vfu_server.trace_format import TraceError, TraceReader

    try:
        with TraceReader.open(arguments.file) as reader:
            return _show(arguments, reader) if arguments.action == "show" else _replay(arguments, reader)
    except BrokenPipeError:  # of standard output: whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return SAME
    except TraceError as error:
        return _report(error, ExitCode.CONFIG)
    except VfuServerError as error:
        return _report(error, exit_code(error))


def _report(error: VfuServerError, code: ExitCode) -> int:
    notes = "".join(f"  {logs.plain(note)}\n" for note in getattr(error, "__notes__", []))
    sys.stderr.write(f"vfu-trace: error: {logs.plain(str(error))}\n{notes}")
    return code


def _show(arguments: argparse.Namespace, reader: "TraceReader") -> int:
    printer = _printer(arguments, reader.header)
    if arguments.json:
        for entry in reader.entries():
            print(json.dumps(printer.record(entry)))
    else:
        print(printer.title())
        for entry in reader.entries():
            print(printer.line(entry))
    _warn(reader)
    return SAME


def _replay(arguments: argparse.Namespace, reader: "TraceReader") -> int:
    from vfu_server import trace_replay
    from vfu_server.testing.memory import GuestMemory

    ignored = [trace_replay.parse_ignored(text) for text in arguments.ignore]
    if not 0 <= arguments.memory <= MAX_MEMORY:
        raise UsageError(f"--memory {arguments.memory}: mebibytes, 0 to {MAX_MEMORY}")
    printer = _printer(arguments, reader.header)
    with _connect(arguments.socket) as client, GuestMemory() as memory:
        if arguments.memory:
            memory.add(0, arguments.memory << 20)
        client.negotiate()
        client.memory = memory
        memory.map_into(client)
        replay = trace_replay.Replay(client, ignored=ignored, fast=arguments.fast)
        replay.begin(reader.header)
        _compare(replay, reader, printer, arguments.limit)
    _warn(reader)
    print(_summary(replay.outcome))
    return DIFFERENT if replay.outcome.different else SAME


def _connect(path: str) -> "Client":
    from vfu_server.testing.client import Client

    try:
        return Client.connect(path)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror or error}") from None


def _compare(replay: "Replay", reader: "TraceReader", printer: "Printer", limit: int) -> None:
    from vfu_server.trace_show import errno_name, number

    for found in replay.run(reader.entries()):
        if replay.outcome.different > limit:
            continue
        now = replace(found.access, data=found.data or found.access.data, errno=found.errno)
        print(f"#{found.access.number} {printer.line(found.access)}")
        answer = errno_name(found.errno) if found.errno else "no error" if now.write else number(now)
        names = "" if found.errno or now.write else printer.decode(now)
        print(f"    now: {answer}{'  ' if names else ''}{names}")
    if replay.outcome.different > limit:
        print(f"    and {replay.outcome.different - limit} more")


def _summary(found: "Outcome") -> str:
    """The outcome in a sentence."""
    skipped = ", ".join(f"{count} {answer.name.lower()}" for answer, count in sorted(found.skipped.items()))
    parts = [
        f"{found.sent} accesses sent, {found.compared} reads among them, {found.different} different",
        f"{found.ignored} differences ignored" if found.ignored else "",
        f"left out, since the server had answered them: {skipped}" if skipped else "",
    ]
    return "; ".join(part for part in parts if part)


def _warn(reader: "TraceReader") -> None:
    """Say what the trace does not have."""
    if reader.lost:
        sys.stderr.write(f"vfu-trace: {reader.lost} accesses were lost when the trace was taken\n")
    if reader.cut_short:
        sys.stderr.write("vfu-trace: the last record is not complete\n")
    if reader.header.mapped:
        sys.stderr.write("vfu-trace: clients could map areas; what they did there is not in the trace\n")


def _printer(arguments: argparse.Namespace, header: "TraceHeader") -> "Printer":
    from vfu_server.trace_show import Printer

    return Printer(header, _blocks(arguments, header))


def _blocks(arguments: argparse.Namespace, header: "TraceHeader") -> "Mapping[int, Block]":
    """The register tables for the traced device. One whose plugin is not here is shown without."""
    from vfu_server import cli_arguments
    from vfu_server.plugins import Plugins

    plugins, options = Plugins(), cli_arguments.options(arguments)
    try:
        plugin = plugins.load(arguments.plugin or header.plugin)
    except PluginError as error:
        if arguments.plugin:
            raise
        sys.stderr.write(f"vfu-trace: no register names: {logs.plain(str(error))}\n")
        return {}
    return plugins.describe(plugin, options).registers.get(header.variant, {})


if __name__ == "__main__":
    main()
