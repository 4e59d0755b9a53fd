"""`vfu-migrate`: moves a device between two running servers, or between a server and a file, as their client.

For tests, laboratories, devices without a VM. What is moved and in which order is the test kit's `migrate`.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NoReturn

from vfu_server import uapi
from vfu_server.cli_parser import Parser
from vfu_server.errors import UsageError, VfuServerError
from vfu_server.testing.client import Client
from vfu_server.testing.migrate import Progress, migrate
from vfu_server.testing.wire import ConnectionClosedError, ReplyError
from vfu_server.tools import migrate_file, migrate_qmp, migrate_show
from vfu_server.tools.outcome import Outcome, end, place_error
from vfu_server.uapi import MigState

PROGRAM = "vfu-migrate"
EPILOG = """\
examples:
  Move a device from one server to another, and stay its client until Ctrl-C.
    vfu-migrate --hold /run/vfu/old.sock /run/vfu/new.sock

  Ask a QEMU whether its migration would carry its vfio-user devices.
    vfu-migrate --qmp /run/vm/qmp.sock

  Save a device's state, look at it, and put it into another.
    vfu-migrate save /run/vfu/old.sock state.bin
    vfu-stream inspect state.bin
    vfu-migrate load state.bin /run/vfu/new.sock

A server resets a device whose client has gone: what was moved runs for as long as this program is its client (--hold).

exit codes:
    0  done: the destination runs with the state; for save: the file is whole and the source runs; for --qmp: a
       migration carries the devices' state, or there are no devices of ours
    1  not done; the error says in which step and why, and what became of the source
    2  the command line cannot be meant
    3  a file or socket cannot be had
"""


class InterruptError(VfuServerError):
    """Somebody wants the program to end; told between two messages, so that the servers are left in order."""


def build() -> argparse.ArgumentParser:
    """The parser."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s [options] (SRC_SOCKET DST_SOCKET | save SOCKET FILE | load FILE SOCKET | --qmp SOCKET)",
        description="Move a device's state between two vfio-user servers, or between a server and a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="*", metavar="WHAT", help="two sockets; or save SOCKET FILE; or load FILE SOCKET"
    )
    parser.add_argument(
        "--qmp",
        metavar="SOCKET",
        help="move nothing: ask the QEMU with this QMP socket whether it can migrate its vfio-user devices",
    )
    parser.add_argument(
        "--no-pre-copy", action="store_true", help="stop the source at once, even if both sides could do more before"
    )
    parser.add_argument(
        "--hold", action="store_true", help="when the destination runs, stay its client until SIGINT or SIGTERM"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `vfu-migrate`."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Do what the command line says; the exit code."""
    parser = build()
    arguments = parser.parse_args(argv)
    try:
        job = _job(arguments)
    except UsageError as error:
        parser.error(str(error))
    with _told_of_signals() as stopped:
        return end(PROGRAM, lambda: job(arguments, stopped))


Stopped = Callable[[], bool]
Job = Callable[[argparse.Namespace, Stopped], Outcome]


def _job(arguments: argparse.Namespace) -> Job:
    words = arguments.words
    if arguments.qmp is not None:
        if words or arguments.no_pre_copy or arguments.hold:
            raise UsageError("--qmp goes with nothing but --quiet")
        return _examine
    if len(words) == 2:
        return _move
    if len(words) != 3 or words[0] not in ("save", "load"):
        raise UsageError("two sockets are needed, or save SOCKET FILE, or load FILE SOCKET")
    for name, given in (("--no-pre-copy", arguments.no_pre_copy), ("--hold", arguments.hold and words[0] == "save")):
        if given:
            raise UsageError(f"{name} has no meaning for {words[0]}")
    return _save if words[0] == "save" else _load


def _examine(arguments: argparse.Namespace, _stopped: Stopped) -> Outcome:
    verdict = migrate_qmp.examine(arguments.qmp)
    _print(arguments, verdict.lines())
    return Outcome.GOOD if verdict.good else Outcome.BAD


def _move(arguments: argparse.Namespace, stopped: Stopped) -> Outcome:
    with ExitStack() as stack:
        source, destination = (stack.enter_context(_connect(path)) for path in arguments.words)
        with migrate_show.progress(quiet=arguments.quiet) as show:
            tell = _interruptible(show, stopped)
            record = migrate(source, destination, pre_copy=False if arguments.no_pre_copy else None, tell=tell)
        _print(arguments, migrate_show.moved(record))
        return _finish(arguments, destination, stopped)


def _save(arguments: argparse.Namespace, stopped: Stopped) -> Outcome:
    _, socket, file = arguments.words
    with _connect(socket) as source:
        with migrate_show.progress(quiet=arguments.quiet) as show:
            line = migrate_file.save_to_file(source, file, _interruptible(show, stopped))
        _print(arguments, migrate_show.steps_table(line.steps))
        _print(arguments, [f"state: {line.bytes} bytes in {file}", "the source runs"])
    return Outcome.GOOD


def _load(arguments: argparse.Namespace, stopped: Stopped) -> Outcome:
    _, file, socket = arguments.words
    with _connect(socket) as destination:
        with migrate_show.progress(quiet=arguments.quiet) as show:
            line = migrate_file.load_from_file(destination, file, _interruptible(show, stopped))
        _print(arguments, migrate_show.steps_table(line.steps))
        _print(arguments, [f"state: {line.bytes} bytes from {file}"])
        return _finish(arguments, destination, stopped)


def _finish(arguments: argparse.Namespace, destination: Client, stopped: Stopped) -> Outcome:
    """Believe the destination's own word only; then stay if that is wished."""
    state = destination.mig_state()
    if state is not MigState.RUNNING:
        raise VfuServerError(f"the destination is in state {state.name}")
    _print(arguments, ["the destination runs"])
    sys.stdout.flush()
    if arguments.hold:
        try:
            while not stopped():
                destination.serve(0.2)
        except ConnectionClosedError as error:
            error.add_note("while the destination was held: the device is lost")
            raise
    return Outcome.GOOD


def _connect(path: str) -> Client:
    """A client of the server at `path`, whose device can migrate. Raises PlaceError, VfuServerError."""
    try:
        client = Client.connect(path)
    except OSError as error:
        raise place_error("connected to", path, error) from error
    try:
        client.negotiate()
        if not client.migration_flags() & uapi.MIGRATION_STOP_COPY:
            raise VfuServerError(f"the device at {path!r} cannot be migrated: its server's log says why")
    except ReplyError as error:
        client.close()
        error.add_note(f"at {path!r}: another client may be there; a server has one at a time")
        raise
    except BaseException:
        client.close()
        raise
    return client


def _interruptible(show: Callable[[Progress], None], stopped: Stopped) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        # From the destination's start on there is nothing to go back to.
        if stopped() and progress.step not in ("destination RUNNING", "source STOP"):
            raise InterruptError("interrupted by a signal")
        show(progress)

    return tell


@contextmanager
def _told_of_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come, instead of ending in the middle of a message."""
    came: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(arguments: argparse.Namespace, lines: Iterable[str]) -> None:
    if not arguments.quiet:
        for line in lines:
            print(line)


if __name__ == "__main__":
    main()
