"""`vfu-server doctor`: its command line, and how a report is printed.

It must not know what is checked. Nothing is served; a function that is in use is not disturbed.
"""

import argparse
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vfu_server.cli_parser import Parser
from vfu_server.errors import ConfigError, UsageError
from vfu_server.exit_codes import ExitCode

if TYPE_CHECKING:
    from vfu_server.host.checks import Finding

EPILOG = """\
examples:
  Check one function, with the command that cures whatever is found.
    vfu-server doctor --bdf 0000:3b:00.1

  Compare two hosts before a migration.
    ssh other vfu-server doctor --bdf 0000:5e:00.1 --json > other.json
    vfu-server doctor --bdf 0000:3b:00.1 --peer other.json

exit codes: 0 when no check fails (warnings are told), 4 when one does, 2 and 3 as of vfu-server.
The function is opened, and thereby reset, only if nobody uses it.
"""


def build() -> argparse.ArgumentParser:
    """The parser of the subcommand."""
    parser = Parser(
        prog="vfu-server doctor",
        description="Say whether a PCI function can be served and migrated, and what to type where it cannot.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--bdf", metavar="BDF", help="the PCI function, for instance 0000:3b:00.1")
    which.add_argument("--mdev", metavar="UUID", help="the mediated device")
    parser.add_argument("--plugin", metavar="NAME", default="auto", help="the plugin to ask (default: all)")
    parser.add_argument(
        "--option", metavar="K=V", action="append", default=[], help="an option of the plugin; repeat it for several"
    )
    parser.add_argument(
        "--peer", metavar="FILE", help="compare with the report that --json has printed on another host"
    )
    parser.add_argument("--json", action="store_true", help="print the report for programs")
    return parser


def run(argv: list[str]) -> ExitCode:
    """Examine, print, and say by the exit code whether anything fails. Raises VfuServerError."""
    arguments = build().parse_args(argv)
    logging.getLogger("vfu_server.host").setLevel(logging.ERROR)  # what the door warns of stands in the report
    from vfu_server import cli_arguments, config
    from vfu_server.config import SourceKind

    kind, value = (SourceKind.MDEV, arguments.mdev) if arguments.mdev else (SourceKind.BDF, arguments.bdf)
    address = config.source(kind, value).value
    options = cli_arguments.options(arguments)
    if arguments.peer and arguments.json:
        raise UsageError("--peer compares for people; --json prints what another host compares with")

    import trio

    from vfu_server import doctor
    from vfu_server.host.checks import Status
    from vfu_server.plugins import Plugins

    peer = doctor.read_report(_read(arguments.peer), arguments.peer) if arguments.peer else None
    diagnose = partial(doctor.diagnose, mediated=kind is SourceKind.MDEV)
    report = trio.run(diagnose, address, Plugins(), arguments.plugin, options)
    findings = list(report.findings)
    if peer is not None:
        findings += doctor.compare(report, peer)
    if arguments.json:
        print(report.as_json())
    else:
        print_findings(findings)
    return ExitCode.DEVICE if any(each.status is Status.FAIL for each in findings) else ExitCode.CLEAN


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--peer {path}: {getattr(error, 'strerror', None) or error}") from None


def print_findings(findings: Iterable["Finding"]) -> None:
    """A line for each, its cure below, indented as it can be copied."""
    from vfu_server import logs

    for finding in findings:
        print(f"{finding.status.value:<4}  {finding.name}: {logs.plain(finding.text)}")
        for line in finding.cure:
            print(f"        {logs.plain(line)}")
