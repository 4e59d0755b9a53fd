"""What the process ends with, and which fault leads to which code.

Exit codes know nothing of where a fault was found; its class says whose it is.
"""

import enum

from vfu_server.errors import ConfigError, PluginError, UsageError, VfuServerError


class ExitCode(enum.IntEnum):
    """The status of the process. Documented in `--help`; scripts and units rely on the numbers."""

    CLEAN = 0
    FORCED = 1
    USAGE = 2
    CONFIG = 3
    DEVICE = 4
    SOCKET = 5
    LOST = 6
    INTERNAL = 70


MEANINGS: dict[ExitCode, str] = {
    ExitCode.CLEAN: "ended on request (SIGTERM, SIGINT), devices at rest and reset, sockets removed",
    ExitCode.FORCED: "ended by force: a second signal, or a device did not come to rest in time",
    ExitCode.USAGE: "the command line cannot be meant",
    ExitCode.CONFIG: "a configuration file, device profile or plugin is wrong or missing",
    ExitCode.DEVICE: "the device cannot be opened or used",
    ExitCode.SOCKET: "the socket for clients cannot be had",
    ExitCode.LOST: "the device was lost while it was served (unplugged, its server died)",
    ExitCode.INTERNAL: "a fault of ours or of a plugin; only this one shows a traceback",
}


class SocketError(VfuServerError):
    """The socket for clients cannot be had; the message names the path and the way out."""


def exit_code(error: BaseException) -> ExitCode:
    """The code for a fault that kept the server from serving."""
    if isinstance(error, SocketError):
        return ExitCode.SOCKET
    if isinstance(error, (ConfigError, PluginError)):
        return ExitCode.CONFIG
    if isinstance(error, UsageError):
        return ExitCode.USAGE
    if isinstance(error, VfuServerError):
        return ExitCode.DEVICE
    return ExitCode.INTERNAL
