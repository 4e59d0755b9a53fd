"""`vfu-plugin`: for those who write plugins: begin one, see which are installed, check one, watch one at work.

What the words mean is decided here; how each is done is in `plugin_new`, `plugin_trace`, `plugin_report` and the test
kit's conformance suite.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vfu_server.cli_parser import Parser
from vfu_server.errors import UsageError
from vfu_server.tools.outcome import Outcome, end, place_error, tell

if TYPE_CHECKING:
    from vfu_server.plugins import Plugins
    from vfu_server.testing.conformance import Target

PROGRAM = "vfu-plugin"
EPILOG = """\
examples:
  Begin a plugin: a package with a device that works, and its tests.
    vfu-plugin new acme_copy
    cd acme_copy && pip install -e .[test] && pytest

  See which plugins are installed, the broken ones with their reasons.
    vfu-plugin list

  Run the conformance suite on a plugin's models, or on two devices that are there.
    vfu-plugin check generic_dmaq
    vfu-plugin check acme_copy --junit report.xml
    vfu-plugin check vfio --device-socket /run/one.sock --device-socket /run/two.sock

  Serve a device as vfu-server does, and see every call of its plugin.
    vfu-plugin trace --plugin generic_dmaq --model edu --socket-path /tmp/edu.sock

exit codes:
    0  done; for check: no check failed
    1  a check failed, or what was asked for cannot be done
    2  the command line cannot be meant
    3  a file or folder cannot be had
"""


def build() -> argparse.ArgumentParser:
    """The parser."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s (new NAME [FOLDER] | list | check NAME [options] | trace [options])",
        description="Begin a plugin, list plugins, check one against its contract, watch one at work.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    words = parser.add_subparsers(dest="word", required=True, metavar="WHAT")
    new = words.add_parser("new", help="write an installable package that works as it stands", allow_abbrev=False)
    new.add_argument("name", metavar="NAME", help="its name as a Python package and as a plugin")
    new.add_argument("folder", metavar="FOLDER", nargs="?", help="where; default: a new folder of that name")
    listing = words.add_parser("list", help="installed plugins and their models", allow_abbrev=False)
    listing.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    _add_check(words.add_parser("check", help="the conformance suite", allow_abbrev=False))
    trace = words.add_parser(
        "trace", help="serve, and write down every call of the plugin; further options are vfu-server's"
    )
    trace.add_argument("--output", metavar="FILE", help="where to; default: standard output")
    trace.add_argument("--trace-format", choices=("text", "json"), default="text", help="default: text")
    return parser


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="an installed plugin")
    parser.add_argument(
        "--model", metavar="NAME", action="append", default=[], help="one of its models; default: all of them"
    )
    parser.add_argument(
        "--device-socket",
        metavar="PATH",
        action="append",
        default=[],
        help="devices behind sockets instead: give two, a source and a destination",
    )
    parser.add_argument("--option", metavar="K=V", action="append", default=[], help="an option of the plugin")
    parser.add_argument("--only", metavar="CHECK", action="append", default=[], help="this check; repeat for several")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="of what is random; default: 1")
    parser.add_argument("--junit", metavar="FILE", help="also write a JUnit XML file")
    parser.add_argument("--list-checks", action="store_true", help="print the checks and end")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `vfu-plugin`."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Do what the command line says; the exit code."""
    parser = build()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.word != "trace":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    def work() -> Outcome:
        try:
            return _act(arguments, rest)
        except UsageError as error:
            tell(PROGRAM, error)
            return Outcome.USAGE

    return end(PROGRAM, work)


def _act(arguments: argparse.Namespace, rest: Sequence[str]) -> Outcome:
    match arguments.word:
        case "new":
            return _new(arguments)
        case "list":
            return _list(arguments)
        case "check":
            return _check(arguments)
    return _trace(arguments, rest)


def _new(arguments: argparse.Namespace) -> Outcome:
    from vfu_server.tools.plugin_new import new

    folder = Path(arguments.folder or arguments.name)
    for path in new(arguments.name, folder):
        print(path)
    print(f"\nnext: cd {folder} && pip install -e .[test] && pytest && {PROGRAM} check {arguments.name}")
    return Outcome.GOOD


def _list(arguments: argparse.Namespace) -> Outcome:
    from vfu_server.cli_print import print_plugins
    from vfu_server.plugins import Plugins

    print_plugins(Plugins(), arguments.format)
    return Outcome.GOOD


def _check(arguments: argparse.Namespace) -> Outcome:
    from vfu_server import config
    from vfu_server.plugins import Plugins
    from vfu_server.testing.conformance import CHECKS, Bench, Verdict
    from vfu_server.testing.conformance import run as run_checks

    if arguments.list_checks:
        for each in CHECKS:
            print(f"{each.name:<14} {each.title}")
        return Outcome.GOOD
    by_name = {each.name: each for each in CHECKS}
    if unknown := [name for name in arguments.only if name not in by_name]:
        raise UsageError(f"--only {unknown[0]}: there is no such check; there are: {', '.join(by_name)}")
    from rich.console import Console

    from vfu_server.tools import plugin_report

    logging.getLogger().addHandler(logging.NullHandler())  # what matters of the log is in the results
    console = Console(highlight=False)
    plugins = Plugins()
    plugin = plugins.load(arguments.name)
    options = dict(config.option(text) for text in arguments.option)
    results = []
    for target in _targets(plugins, arguments):
        console.print(f"{plugin.name} {plugin.version}: {target.name}", style="bold", markup=False)
        with Bench(plugin.name, target, plugins=plugins, options=options, seed=arguments.seed) as bench:
            chosen = [by_name[name] for name in arguments.only]
            results += run_checks(bench, chosen, lambda result: plugin_report.show(console, result))
    console.print(plugin_report.summary(results), markup=False)
    if arguments.junit:
        plugin_report.write_junit(arguments.junit, plugin.name, plugin.version, results)
    failed = any(result.verdict is Verdict.FAILED for result in results)
    return Outcome.BAD if failed else Outcome.GOOD


def _targets(plugins: "Plugins", arguments: argparse.Namespace) -> "list[Target]":
    from vfu_server.testing.conformance import Target

    sockets = arguments.device_socket
    if sockets and arguments.model:
        raise UsageError("--model and --device-socket exclude each other")
    if len(sockets) not in (0, 2):
        raise UsageError(f"--device-socket: two are needed, a source and a destination, not {len(sockets)}")
    if sockets:
        return [Target(" and ".join(sockets), sockets=sockets)]
    names = arguments.model or list(plugins.models(arguments.name))
    if not names:
        raise UsageError(f"plugin {arguments.name!r} ships no model: give two devices with --device-socket")
    return [Target(name, plugins.model(arguments.name, name)) for name in names]


def _trace(arguments: argparse.Namespace, rest: Sequence[str]) -> Outcome:
    from vfu_server import cli_arguments, cli_parser, logs, server
    from vfu_server.tools.plugin_trace import Recorder, TracedPlugins

    words = cli_parser.build().parse_args([word for word in rest if word != "--"])
    config = cli_arguments.server_config(words)
    logs.configure(config.log_level, config.log_format)
    try:
        out = open(arguments.output, "w", encoding="utf-8") if arguments.output else sys.stdout  # noqa: SIM115
    except OSError as error:
        raise place_error("written", arguments.output, error) from error
    code = server.run(config, TracedPlugins(Recorder(out, arguments.trace_format)))
    return Outcome.GOOD if code == 0 else Outcome.BAD


if __name__ == "__main__":
    main()
