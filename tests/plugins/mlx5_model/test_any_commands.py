"""Any commands in any order: the model answers each, keeps its rules, and never fails itself.

A failure of the model's own comes out of these tests as an exception: the bench calls it directly.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugins.mlx5.models.traffic import Traffic
from tests.plugins.mlx5_model.bench import Card
from tests.plugins.mlx5_model.raw import Buffer, DeliveryError, Raw, StatusError, put, words

KNOWN = {2, 3, 4, 5, 6, 7, 8, 9, 0xA, 0xF, 0x10, 0x50, 0x51}
STATES = {0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x09, 0x07}
OPCODES = [
    *(0x100, 0x101, 0x102, 0x103, 0x104, 0x105, 0x107, 0x108, 0x109, 0x10A, 0x10B, 0x115, 0x116, 0x117, 0x118, 0x119),
    *(0x200, 0x202, 0x301, 0x302, 0x303, 0x400, 0x401, 0x500, 0x501, 0x502, 0x503, 0x504, 0x750, 0x751, 0x752, 0x753),
    *(0x754, 0x755, 0x800, 0x801, 0x802, 0x803, 0x805, 0x829, 0x82B, 0x92F, 0x930, 0x931, 0x933, 0x934, 0x936, 0x938),
    *(0xA00, 0xA01, 0xA02, 0xA03, 0xFFF),
]
SIZES = [16, 32, 0x40, 0x110, 0x118, 0x120, 0x200, 0x340, 0x348, 0x400, 0x1010]
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


def known(error: StatusError, statuses: set[int]) -> None:
    assert error.status in statuses, error


@st.composite
def commands(draw) -> tuple[bytes, int]:
    """(input, room): mostly zeros, with small numbers where objects and functions are named."""
    size = draw(st.sampled_from(SIZES))
    fields = {0: draw(st.sampled_from(OPCODES)) << 16}
    for _ in range(draw(st.integers(0, 6))):
        at = 4 * draw(st.integers(1, min(size // 4 - 1, 0x60)))
        low = st.integers(0, 0x60)
        value = st.one_of(low, st.integers(0, 31).map(lambda bit: 1 << bit), st.integers(0, (1 << 32) - 1), low)
        fields[at] = draw(value)
    return put(size, *((at, 0, value) for at, value in fields.items())), draw(st.sampled_from([16, 32, 0x110, 0x1010]))


@pytest.mark.deadline(300)
@QUICK
@given(st.lists(commands(), min_size=1, max_size=12))
def test_any_bytes_are_answered(found):
    card = Card()
    raw = Raw(card.pf)
    raw.boot()
    raw.serve_pages = False
    for data, room in found:
        if not card.state()["stage"]:
            break
        try:
            raw.command(data, room)
        except StatusError as error:
            known(error, KNOWN)
        except DeliveryError:
            pytest.fail("the entry was right")
    card.models["pf"].reset()
    raw.eq = None
    raw.given.clear()
    raw.serve_pages = True
    raw.boot().enable_vf()


class Mover:
    """Two cards with a guest; steps by name. `book`: the rules about suspending, kept a second time."""

    def __init__(self, *, chunks: bool) -> None:
        caps = {} if chunks else {"migration_in_chunks": 0}
        self.chunks = chunks
        self.card = Card(caps=caps, image_size=128 << 10, chunk_size=64 << 10, save_pages=2)
        self.raw = Raw(self.card.pf).boot()
        self.vhca = self.raw.enable_vf()
        self.buffer = Buffer(self.raw, 256 << 10)
        self.images: list[bytes] = []
        self.stopped = (False, False)
        self.traffic: Traffic | None = None

    def step(self, name: str) -> None:
        """One step; a refusal is one of those that the rules know."""
        before = self.stopped
        try:
            getattr(self, name)()
        except StatusError as error:
            known(error, STATES)
            self.stopped = before
        self.compare()

    def compare(self) -> None:
        state = self.card.state()
        found = tuple(bool(state[f"vf[0].{part}_stopped"]) for part in ("initiator", "responder"))
        assert found == self.stopped

    def suspend_initiator(self) -> None:
        self.raw.suspend(self.vhca, 0)
        assert self.stopped == (False, False)
        self.stopped = (True, False)

    def suspend_responder(self) -> None:
        self.raw.suspend(self.vhca, 1)
        assert self.stopped == (True, False)
        self.stopped = (True, True)

    def resume_responder(self) -> None:
        self.raw.resume(self.vhca, 0)
        assert self.stopped == (True, True)
        self.stopped = (True, False)

    def resume_initiator(self) -> None:
        self.raw.resume(self.vhca, 1)
        assert self.stopped == (True, False)
        self.stopped = (False, False)

    def query(self) -> None:
        assert self.raw.query(self.vhca, chunk=self.chunks)[1]

    def query_changes(self) -> None:
        self.raw.query(self.vhca, inc=True, chunk=self.chunks)

    def save(self) -> None:
        self.images.append(self.raw.save(self.vhca, self.buffer)[0])

    def save_track(self) -> None:
        self.images = [self.raw.save(self.vhca, self.buffer, track=True)[0]]

    def save_changes(self) -> None:
        self.images.append(self.raw.save(self.vhca, self.buffer, inc=True, track=True)[0])

    def save_last(self) -> None:
        self.images.append(self.raw.save(self.vhca, self.buffer, inc=True, size=100 << 10)[0])

    def load(self) -> None:
        for image in self.images:
            self.raw.load(self.vhca, self.buffer, image)

    def load_last(self) -> None:
        if self.images:
            self.raw.load(self.vhca, self.buffer, self.images[-1])

    def work(self) -> None:
        if self.stopped == (False, False):
            self.reset()
            self.traffic = Traffic(self.card.vfs[0])
            self.traffic.start()
            self.traffic.run(5)

    def reset(self) -> None:
        self.card.models["vf0"].reset()
        self.card.clock.advance(0.1)
        self.stopped = (False, False)


STEPS = [name for name, found in vars(Mover).items() if callable(found) and not name.startswith("_")]
STEPS = [name for name in STEPS if name not in ("step", "compare")]


@pytest.mark.deadline(300)
@LONG
@given(st.booleans(), st.lists(st.sampled_from(STEPS), min_size=5, max_size=40))
def test_any_order_of_moving_is_answered(chunks, steps):
    mover = Mover(chunks=chunks)
    for name in steps:
        mover.step(name)
    mover.reset()
    mover.raw.settle()
    mover.work()
    mover.raw.stop(mover.vhca)
    images = mover.raw.save_all(mover.vhca, mover.buffer, chunk=mover.chunks)
    mover.reset()
    mover.raw.stop(mover.vhca)
    for image in images:
        mover.raw.load(mover.vhca, mover.buffer, image)
    mover.raw.go(mover.vhca)
    mover.stopped = (False, False)
    mover.compare()
    mover.traffic.run(5)
    assert words(mover.raw.cap(0, 1, 1))[1] & 0xFFFF == mover.vhca
