"""`python -m plugins.hns.models KIND [options] --socket-path P`: serves one accelerator. KIND is zip, sec or hpre.

VF 0 is served at P, the PF at P.pf, further VFs at P.vf1 and so on.
"""

import argparse
import functools
import sys

from plugins.hns.models.accelerator import functions
from plugins.hns.models.generation import Order
from plugins.hns.registers import KINDS
from vfu_server.errors import UsageError
from vfu_server.model_server import main_functions

_number = functools.partial(int, base=0)


def run(argv: list[str]) -> int:
    """Options of the model itself; the rest is the server's."""
    options, rest = _parser().parse_known_args(argv)
    kind = next(kind for kind in KINDS if kind.name == options.name)
    try:
        order = Order(
            kind,
            revision=options.revision,
            sub_version=options.sub_version,
            pf_ctrl=options.mode == "pf-ctrl",
            vfs=options.vfs,
            queues=options.queues,
            pf_queues=options.pf_queues,
            isolation=options.doorbell_isolation,
            entry_seconds=options.entry_seconds,
        )
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return main_functions(functions(order), rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="models", add_help=False)
    kinds = parser.add_subparsers(dest="name", required=True, metavar="KIND")
    for kind in KINDS:
        one = kinds.add_parser(kind.name, add_help=False)
        one.add_argument("--revision", type=_number, default=0x30, help="0x21, 0x30 (V3), 0x50 (V4) or 0x51 (V5)")
        one.add_argument("--sub-version", type=_number, default=0, help="what register 0x210 answers")
        one.add_argument(
            "--mode", choices=("vf-ctrl", "pf-ctrl"), default="vf-ctrl", help="where migration registers are"
        )
        one.add_argument("--vfs", type=_number, default=1, help="how many VFs the PF has")
        one.add_argument("--queues", type=_number, default=16, help="queues of each VF")
        one.add_argument("--pf-queues", type=_number, default=64, help="queues of the PF; the VFs' come behind")
        one.add_argument("--doorbell-isolation", action=argparse.BooleanOptionalAction, default=True)
        one.add_argument("--entry-seconds", type=float, default=5e-6, help="how long an entry is at hand")
    return parser


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
