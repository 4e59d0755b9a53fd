"""`python -m plugins.mlx5.models connectx [options] --socket-path PATH`: serves a card, a socket for each function."""

import argparse
import os
import sys
from collections.abc import Callable

from plugins.mlx5.models.caps import LAYOUTS, PLACES
from plugins.mlx5.models.functions import functions
from plugins.mlx5.models.options import LEAST_IMAGE, MOST_VFS, Options
from vfu_server.model_server import main_functions

_UNITS = {"K": 10, "M": 20, "G": 30}


def size(text: str) -> int:
    """A number of bytes: 65536, 64K, 1M, 4G."""
    unit = _UNITS.get(text[-1:].upper())
    return int(text[:-1], 0) << unit if unit else int(text, 0)


def image_size(text: str) -> int:
    """A state's size: whole pages, not too few."""
    value = size(text)
    if value < LEAST_IMAGE or value % 4096:
        raise argparse.ArgumentTypeError(f"whole pages, {LEAST_IMAGE} bytes or more")
    return value


def count(least: int, most: int) -> Callable[[str], int]:
    """A number between two others."""

    def parse(text: str) -> int:
        value = int(text, 0)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"a number from {least} to {most}")
        return value

    return parse


def rate(text: str) -> float:
    """Bytes in a second."""
    value = float(text)
    if not 0 < value <= 1e15:
        raise argparse.ArgumentTypeError("a number above 0")
    return value


def capability(text: str) -> tuple[str, int]:
    """NAME=NUMBER of a capability."""
    name, _, number = text.partition("=")
    if name not in PLACES:
        raise argparse.ArgumentTypeError(f"there is no capability {name!r}")
    value = int(number or "1", 0)
    if not 0 <= value <= LAYOUTS[PLACES[name].kind].limit(name):
        raise argparse.ArgumentTypeError(f"{name} cannot be {value}")
    return name, value


def build() -> argparse.ArgumentParser:
    """The parser of the card's own options."""
    parser = argparse.ArgumentParser(prog="models", add_help=False)
    models = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    card = models.add_parser("connectx", add_help=False)
    plain = Options()
    card.add_argument("--vfs", type=count(1, MOST_VFS), default=plain.vfs)
    card.add_argument("--image-size", type=image_size, default=plain.image_size)
    card.add_argument("--chunk-size", type=size, default=plain.chunk_size)
    card.add_argument("--no-chunks", action="store_true")
    card.add_argument("--save-rate", type=rate, default=plain.save_rate)
    card.add_argument("--command-timeout", type=count(1, 7200), default=plain.command_seconds)
    for name in ("boot_pages", "init_pages", "vf_pages", "save_pages"):
        card.add_argument(f"--{name.replace('_', '-')}", type=count(0, 1 << 20), default=getattr(plain, name))
    card.add_argument("--migratable", action="store_true")
    card.add_argument("--device-id", type=lambda text: int(text, 0), default=plain.device_id)
    card.add_argument("--psid", default=plain.psid)
    card.add_argument("--firmware", default=".".join(map(str, plain.firmware)))
    card.add_argument("--cap", type=capability, action="append", default=[])
    card.add_argument("--seed", default=None)
    return parser


def parse(argv: list[str]) -> tuple[Options, str, list[str]]:
    """Options of the card, its seed, and the arguments that are the server's."""
    parser = build()
    found, rest = parser.parse_known_args(argv)
    caps = dict(found.cap)
    if found.no_chunks:
        caps["migration_in_chunks"] = 0
    try:
        major, minor, sub = (int(part) for part in found.firmware.split("."))
    except ValueError:
        parser.error("--firmware is MAJOR.MINOR.SUB")
    options = Options(
        vfs=found.vfs,
        image_size=found.image_size,
        chunk_size=max(found.chunk_size, LEAST_IMAGE // 2),
        save_rate=found.save_rate,
        command_seconds=found.command_timeout,
        boot_pages=found.boot_pages,
        init_pages=found.init_pages,
        vf_pages=found.vf_pages,
        save_pages=found.save_pages,
        migratable=found.migratable,
        device_id=found.device_id,
        psid=found.psid,
        firmware=(major, minor, sub),
        caps=caps,
    )
    return options, found.seed or f"pid {os.getpid()}", rest


def run(argv: list[str]) -> int:
    """The program."""
    options, seed, rest = parse(argv)
    return main_functions(functions(options, seed), rest)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
