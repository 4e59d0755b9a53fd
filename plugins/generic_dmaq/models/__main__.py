"""`python -m plugins.generic_dmaq.models NAME --socket-path PATH`: serves one of the models. NAME is edu or ioat."""

import argparse
import functools
import sys

from plugins.generic_dmaq.models.edu import DMA_MASK, EduModel
from plugins.generic_dmaq.models.ioat import IoatModel
from vfu_server.model_server import main


def run(argv: list[str]) -> int:
    """Options of the models themselves; the rest is the server's."""
    parser = argparse.ArgumentParser(prog="models", add_help=False)
    models = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    edu = models.add_parser("edu", add_help=False)
    edu.add_argument("--dma-mask", type=functools.partial(int, base=0), default=DMA_MASK)
    ioat = models.add_parser("ioat", add_help=False)
    ioat.add_argument("--channels", type=int, choices=(1, 2), default=1)
    options, rest = parser.parse_known_args(argv)
    if options.name == "edu":
        return main(functools.partial(EduModel, options.dma_mask), rest)
    return main(functools.partial(IoatModel, options.channels), rest)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
