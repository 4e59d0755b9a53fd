"""Which bits of config space reset a function, and what is left of a write that has them."""

import pytest

from vfu_server.pciconfig import PciConfig
from vfu_server.session_config import flr_bits, without_flr

EXP = 0x60
DEVCTL = EXP + 8


def header(*, flr: bool = True) -> bytes:
    config = PciConfig(vendor=1, device=2, class_code=3)
    config.add_express(EXP, flr=flr)
    return config.read(0, 256)


def test_bits_are_where_the_capability_says() -> None:
    assert flr_bits(header()) == [(DEVCTL + 1, 0x80)]
    assert flr_bits(header(flr=False)) == []
    af = bytearray(256)
    af[0x06], af[0x34] = 0x10, 0x80
    af[0x80:0x86] = bytes((0x13, 0, 6, 3, 0, 0))
    assert flr_bits(bytes(af)) == [(0x84, 0x01)]


@pytest.mark.parametrize(
    ("offset", "data", "left"),
    [
        (DEVCTL, b"\x54\xb6", b"\x54\x36"),
        (DEVCTL, b"\xff\xff\xff\xff", b"\xff\x7f\xff\xff"),
        (DEVCTL + 1, b"\x80", b"\x00"),
        (DEVCTL - 4, b"\xff" * 8, b"\xff" * 5 + b"\x7f" + b"\xff" * 2),
        (DEVCTL, b"\x80", b"\x80"),
        (DEVCTL + 2, b"\x80\x80", b"\x80\x80"),
        (0, b"\xff" * 4, b"\xff" * 4),
    ],
)
def test_what_is_left_of_a_write(offset: int, data: bytes, left: bytes) -> None:
    assert without_flr(header(), offset, data) == left
    assert without_flr(header(flr=False), offset, data) == data
