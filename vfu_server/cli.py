"""The program: reads the command line, does what it says, and turns every fault into a message and an exit code.

It must not know how anything is done. Imports are put off until they are needed: `--help` and a mistyped option need
neither trio nor the plugins.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from vfu_server import cli_parser, logs
from vfu_server.errors import UsageError, VfuServerError
from vfu_server.exit_codes import ExitCode, exit_code

if TYPE_CHECKING:
    import argparse

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `vfu-server`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the server takes it over: no traceback for a Ctrl-C
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the server can answer it
    gc.disable()  # imports make no garbage; the server enables it when it has started
    code = run(list(sys.argv[1:] if argv is None else argv))
    sys.stdout.flush()
    logging.shutdown()
    sys.exit(code)


def run(argv: list[str]) -> ExitCode:
    """Do what the command line says."""
    if "--print-capabilities" in argv:  # the conventions want every other option ignored, unknown ones too
        from vfu_server import cli_print

        cli_print.print_capabilities()
        return ExitCode.CLEAN
    if argv[:1] == ["doctor"]:
        from vfu_server import cli_doctor

        logs.configure("warning", "text")
        return _guarded(lambda: cli_doctor.run(argv[1:]), "text")
    arguments = cli_parser.build().parse_args(argv)
    form = arguments.log_format or "text"
    logs.configure(arguments.log_level or "info", form)
    return _guarded(lambda: _act(arguments), form)


def _act(arguments: "argparse.Namespace") -> ExitCode:
    if arguments.list_plugins or arguments.show_policy or arguments.version:
        return _inform(arguments)
    if arguments.format:
        raise UsageError("--format goes with --show-policy or --list-plugins")
    return _serve(arguments)


def _guarded(act: Callable[[], ExitCode], form: str) -> ExitCode:
    """What `act` ends with; a fault becomes a message and its exit code."""
    try:
        return act()
    except VfuServerError as error:
        return _report(error, form)
    except BrokenPipeError:  # of standard output: whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.CLEAN
    except Exception:
        logger.exception("internal error")
        return ExitCode.INTERNAL


def _inform(arguments: "argparse.Namespace") -> ExitCode:
    from vfu_server import cli_arguments, cli_print
    from vfu_server.plugins import AUTO, Plugins

    plugins = Plugins()
    form = arguments.format or "text"
    if arguments.version:
        cli_print.print_versions(plugins)
    elif arguments.list_plugins and form == "markdown":
        raise UsageError("--format markdown goes with --show-policy")
    elif arguments.list_plugins:
        cli_print.print_plugins(plugins, form)
    else:
        options = cli_arguments.options(arguments)
        cli_print.print_policy(plugins, arguments.plugin or AUTO, options, arguments.mmap or "plugin", form)
    return ExitCode.CLEAN


def _serve(arguments: "argparse.Namespace") -> ExitCode:
    from vfu_server import cli_arguments

    config = cli_arguments.server_config(arguments)
    logs.configure(config.log_level, config.log_format)
    from vfu_server import server

    return server.run(config)


def _report(error: VfuServerError, form: str) -> ExitCode:
    """Say what is wrong in one line, with its notes. Only a bug of a plugin shows where it happened."""
    from vfu_server.plugins import PluginCrashError

    crash = isinstance(error, PluginCrashError)
    notes = getattr(error, "__notes__", [])
    if form == "json" or crash:
        logger.error("%s", "; ".join([str(error), *notes]), exc_info=error if crash else None)
    else:
        lines = "".join(f"  {logs.plain(note)}\n" for note in notes)
        sys.stderr.write(f"vfu-server: error: {logs.plain(str(error))}\n{lines}")
    return ExitCode.INTERNAL if crash else exit_code(error)
