"""A card in software with the server of its virtual functions, both as processes, and a guest's way to such a function.

Knows no test.
"""

import contextlib
import json
import socket

from tests.end_to_end.served import Process
from tests.model_process import ModelProcess
from vfu_server.errors import DeadlineError
from vfu_server.testing import Guest, GuestMemory

MB = 1 << 20
SMALL = ("--boot-pages", "8", "--init-pages", "40", "--vf-pages", "8", "--save-pages", "4")


class GuestPort:
    """The guest as a driver of the function's data path sees it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def read(self, region, offset, width):
        return self.guest.read(region, offset, width)

    def write(self, region, offset, width, value):
        self.guest.write(region, offset, width, value)

    def load(self, iova, length):
        return self.guest.memory.read(iova, length)

    def store(self, iova, data):
        self.guest.memory.write(iova, data)

    def wait(self, until, what):
        for _ in range(30000):
            if until():
                return
            self.guest.client.serve(0.002)
        raise DeadlineError(f"waited for {what}")


class Served:
    """A card, and the server of its virtual functions."""

    def __init__(self, folder, *arguments, options=()):
        folder.mkdir()
        self.card = ModelProcess(folder, "connectx", *SMALL, *arguments, module="plugins.mlx5.models", time_scale=0.1)
        self.path = str(folder / "s")
        self.server = Process(
            *("--plugin", "mlx5", "--device-socket", self.card.path, "--socket-path", self.path, *options)
        )

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *exception):
        self.server.__exit__(*exception)
        print(self.server.log)
        status, said = self.card.terminate()
        self.card.close()
        print(said)
        assert status == 0, said

    def guest(self, memory=None):
        return Guest.connect(self.path, memory or GuestMemory.of(8 * MB), timeout=30.0)

    def order(self, name, times=1):
        assert self.card.control("fault", name=name, times=times) == {}

    @property
    def registers(self):
        return card_state(self.card)


def card_state(card):
    """What a card counts, by the control socket of its physical function."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.settimeout(30)
        control.connect(f"{card.path.with_name('control.sock')}.pf")
        control.sendall(b'{"op": "state"}\n')
        with control.makefile("rb") as answers:
            return json.loads(answers.readline())["registers"]


@contextlib.contextmanager
def card_of(folder, *arguments):
    """A card whose functions' servers are the test's affair."""
    card = ModelProcess(folder, "connectx", *SMALL, *arguments, module="plugins.mlx5.models", time_scale=0.1)
    try:
        yield card
    finally:
        status, said = card.terminate()
        card.close()
        print(said)
        assert status == 0, said


def server_of(card, number, path):
    """The arguments that serve virtual function `number` of a card with several."""
    where = card.path if not number else f"{card.path}.vf{number}"
    options = ("--option", f"pf={card.path}.pf", "--option", f"vf={number}")
    return ("--plugin", "mlx5", "--device-socket", where, "--socket-path", path, *options)


@contextlib.contextmanager
def two(folder, *arguments, options=()):
    with (
        Served(folder / "a", *arguments, options=options) as first,
        Served(folder / "b", *arguments, options=options) as second,
    ):
        yield first, second
