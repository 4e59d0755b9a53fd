"""The command line: its options, and a help text that teaches.

It must not act on anything; what the options mean together is `cli_arguments`' to decide.
"""

import argparse
from typing import NoReturn

from vfu_server import config, logs
from vfu_server.exit_codes import MEANINGS, ExitCode

EXAMPLES = """\
examples:
  Try it without hardware: the edu plugin's own software model as the device.
    vfu-server --plugin generic_dmaq --model edu --socket-path /tmp/edu.sock

  Serve a real function that is bound to vfio-pci; its socket is /run/vfu/0000:3b:00.1.sock.
    vfu-server --plugin mlx5 --bdf 0000:3b:00.1

  Give it to QEMU (guest memory must be shared, so that the device can reach it):
    qemu-system-x86_64 ... -object memory-backend-memfd,id=ram,size=4G,share=on -machine q35,memory-backend=ram \\
      -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/run/vfu/0000:3b:00.1.sock"}}'

  Two functions, one server, a socket for each; QEMU runs in group kvm.
    vfu-server --bdf 3b:00.1 --bdf 3b:00.2 --socket-path /run/vfu/%n.sock --socket-group kvm

  See which accesses are allowed while the device is stopped, before anything is opened.
    vfu-server --plugin generic_dmaq --show-policy

  Describe several devices in a file.
    vfu-server --config /etc/vfu-server/server.toml
"""


class Parser(argparse.ArgumentParser):
    """Complains in one line, and says where to read on."""

    def error(self, message: str) -> NoReturn:
        """A usage error ends the process."""
        self.exit(ExitCode.USAGE, f"{self.prog}: error: {message}\n{self.prog}: try --help for options and examples\n")


def _epilog() -> str:
    codes = "\n".join(f"  {code.value:>3}  {meaning}" for code, meaning in MEANINGS.items())
    return f"{EXAMPLES}\nexit codes:\n{codes}\n"


def build() -> argparse.ArgumentParser:
    """The parser. Options that were not given are None or empty, so that a configuration file can tell."""
    parser = Parser(
        prog="vfu-server",
        usage="%(prog)s [--plugin NAME] "
        "(--bdf BDF | --model NAME | --device-socket PATH | --mdev UUID | --config FILE) [options]",
        description="Present a PCI device to QEMU over vfio-user, so that it can be live-migrated. A plugin knows\n"
        "the hardware; the server enforces which accesses are allowed in which migration state.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_device(parser)
    _add_socket(parser)
    _add_policy(parser)
    _add_process(parser)
    _add_information(parser)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which device, and who knows it")
    group.add_argument(
        "--plugin", metavar="NAME", help="the plugin for the device, or 'auto' (default): the plugins' probes decide"
    )
    group.add_argument(
        "--bdf",
        metavar="BDF",
        action="append",
        default=[],
        help="a PCI function bound to vfio-pci, for instance 0000:3b:00.1; repeat it to serve several",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        action="append",
        default=[],
        help="a software model that the plugin ships, started as a child process: no hardware needed",
    )
    group.add_argument(
        "--device-socket",
        metavar="PATH",
        action="append",
        default=[],
        help="a device that another vfio-user server serves at PATH",
    )
    group.add_argument(
        "--mdev",
        metavar="UUID",
        action="append",
        default=[],
        help="a mediated device of a driver in the kernel, by its UUID; repeat it to serve several",
    )
    group.add_argument(
        "--option",
        metavar="K=V",
        action="append",
        default=[],
        help="an option of the plugin (see its README); repeat it for several",
    )
    group.add_argument(
        "--vf-token",
        metavar="UUID",
        help="the token that the kernel asks for when the VF's PF is under vfio-pci, too; with one --bdf",
    )
    group.add_argument(
        "--vfio-fd",
        metavar="N",
        type=int,
        help="use the inherited open device node (/dev/vfio/devices/vfioN) of the one --bdf; needs --iommufd",
    )
    group.add_argument(
        "--iommufd", metavar="N", type=int, help="use the inherited open /dev/iommu; goes with --vfio-fd"
    )
    group.add_argument("--config", metavar="FILE", help="read devices and settings from a TOML file; options prevail")


def _add_socket(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where clients connect")
    group.add_argument(
        "--socket-path",
        metavar="PATH",
        action="append",
        default=[],
        help="UNIX socket to listen at; %%n is the device's name, %%i its number, %%%% a percent sign; "
        "default: NAME.sock in /run/vfu, for users in $XDG_RUNTIME_DIR/vfu",
    )
    group.add_argument(
        "--fd",
        metavar="N",
        action="append",
        type=int,
        default=[],
        help="use the inherited UNIX socket N instead: one that listens, or a client's connection",
    )
    group.add_argument(
        "--socket-group", metavar="GROUP", help="let this group connect, too (mode 0660 instead of 0600)"
    )


def _add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what clients may do")
    group.add_argument(
        "--mmap",
        choices=config.MMAP_MODES,
        help="areas that a client may map: never (the only mode that stands against a hostile client), "
        "plugin (default: those that are harmless while the device is stopped), all",
    )
    group.add_argument(
        "--revoke",
        action="store_true",
        default=None,
        help="while a device is stopped, switch its memory decoding off, so that the kernel takes clients' mappings "
        "away: catches stray accesses, not hostile ones (a client can switch it on again); a vCPU that still touches "
        "the device is killed; registers that the policy passes on answer EIO meanwhile. "
        "With --bdf only, and not on virtual functions, which have no such bit",
    )
    group.add_argument(
        "--dirty-tracking",
        choices=config.DIRTY_TRACKING_MODES,
        help="auto (default): by the device or the IOMMU, else no live migration is offered; "
        "all: where neither can, report all writable memory as dirty",
    )
    group.add_argument(
        "--allow-p2p",
        action="store_true",
        default=None,
        help="let a device reach memory of other devices whose files a client gives; only where the plugin says that "
        "this device can hold such DMA back, and only by type1 (groups)",
    )
    group.add_argument(
        "--require-migration",
        action="store_true",
        default=None,
        help="refuse to serve a device that cannot be migrated",
    )


def _add_process(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logging and watching")
    group.add_argument("--log-level", choices=logs.LEVELS, help="default: info")
    group.add_argument("--log-format", choices=logs.FORMATS, help="default: text; always on standard error")
    group.add_argument(
        "--metrics",
        metavar="ADDRESS",
        help="tell Prometheus metrics at unix:PATH, or at HOST:PORT of this machine's loopback; "
        "needs the extra 'metrics'. SIGUSR1 logs the same numbers in any case",
    )
    group.add_argument(
        "--trace-regions",
        metavar="FILE",
        help="write every access that the server sees to FILE, for vfu-trace; %%n and %%i as in --socket-path. "
        "Accesses to mapped areas are seen by nobody: see --mmap never",
    )


def _add_information(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("information; prints and ends")
    actions = group.add_mutually_exclusive_group()
    actions.add_argument(
        "--list-plugins", action="store_true", help="installed plugins and their models, broken ones too"
    )
    actions.add_argument(
        "--show-policy", action="store_true", help="the access policy of --plugin's devices, by migration state"
    )
    actions.add_argument("--print-capabilities", action="store_true", help="what this program can do, as JSON")
    actions.add_argument("--version", action="store_true", help="versions of the server and its plugins")
    group.add_argument(
        "--format",
        choices=("text", "json", "markdown"),
        help="form of --show-policy and --list-plugins (which has no markdown)",
    )
