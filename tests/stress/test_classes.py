"""A client that hammers all regions while the class of states changes: what reached the device, and what was answered.

Everything is stamped with the one clock. Between the return of one switch and the call of the next the class is known,
and all that happens there must be as the policy says; around a switch either class's answer is right. Accesses of one
client come to the device in the client's order, and each carries bytes of its own, so that each is found again.
"""

import bisect
import itertools
import random
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

import pytest

from tests.stress.table import SIZES, Presented, Reached, expected, policy_rules, refusal
from vfu_server.policy import Answer, StateClass
from vfu_server.testing import Client, ReplyError

SECONDS = 1.5
MOST_PENDING = 12
"""Accesses of the client within one class, at most: so many switches come that many accesses meet one."""


@dataclass(frozen=True, slots=True)
class Switch:
    """The class was `state_class` at the latest at `end`, and not before `begin`; ns."""

    begin: int
    end: int
    state_class: StateClass


@dataclass(slots=True)
class Done:
    """One access of the client's, from `begin` to `end` in ns. `error` 0: answered well; None: posted, not answered."""

    begin: int
    end: int
    write: bool
    region: int
    offset: int
    width: int
    data: bytes
    error: int | None


class Hammer(threading.Thread):
    """The client: one access after the other until `stop`."""

    def __init__(self, sock, rules, seed):
        super().__init__(name="hammer")
        self.sock, self.rules, self.rng = sock, rules, random.Random(seed)
        self.stop = threading.Event()
        self.moved = threading.Event()
        self.done: list[Done] = []
        self.failure = None

    def run(self):
        try:
            with Client(self.sock) as client:
                client.negotiate()
                while not self.stop.is_set():
                    self.one(client)
                client.get_info()  # what was posted last is served before this is answered
        except Exception as error:  # noqa: BLE001 - told where the test waits for it
            self.failure = error
        self.moved.set()

    def one(self, client):
        region = self.rng.choice([*SIZES])
        rule = self.rng.choice([rule for rule in self.rules if rule.region == region])
        width = self.rng.choice([4, 4, 4, 8, 8, 5, 7])
        offset = min(max(0, self.rng.randint(rule.start - 2, rule.end)), SIZES[region] - width)
        if self.rng.random() < 0.7:
            offset = offset // 4 * 4 if width in (4, 8) and offset // 4 * 4 + width <= SIZES[region] else offset
        write, posted = self.rng.random() < 0.5, self.rng.random() < 0.2
        data = self.rng.randbytes(width) if write else b""
        error = None if write and posted else 0
        begin = time.monotonic_ns()
        try:
            if write:
                client.region_write(region, offset, data, posted=posted)
            else:
                data = client.region_read(region, offset, width)
        except ReplyError as refused:
            error = refused.errno
        self.done.append(Done(begin, time.monotonic_ns(), write, region, offset, width, data, error))
        self.moved.set()


class Verdict:
    """Goes through the client's accesses in order, and through what came to the device, the plugin and the store."""

    def __init__(self, presented, switches, done, kept):
        self.rules, self.switches, self.done = presented.rules, switches, done
        self.snapshots = [one for one in presented.device.log if one.thread == threading.get_ident()]
        self.reached = deque(one for one in presented.device.log if one.thread != threading.get_ident())
        self.trapped = deque(presented.traps.log)
        self.kept = deque(kept)
        self.pieces: dict[tuple[int, int], list[Reached]] = {}
        """What snapshots read, by region and offset: the same pieces each time."""
        for one in self.snapshots:
            self.pieces.setdefault((one.region, one.offset), []).append(one)
        self.piece_of = {
            (region, at): offset
            for (region, offset), (one, *_) in self.pieces.items()
            for at in range(offset, offset + len(one.data))
        }
        self.stored: dict[tuple[int, int], set[int]] = {}
        assert len({access.thread for access in (*self.reached, *self.trapped)}) == 1, "only the pump's thread serves"
        self.sure = {}
        self.unsure = 0

    def classes(self, begin, end):
        """The classes that may have held at a moment of [begin, end]."""
        first = bisect.bisect_left(self.switches, begin, key=lambda switch: switch.end) - 1
        last = bisect.bisect_right(self.switches, end, key=lambda switch: switch.begin)
        return {switch.state_class for switch in self.switches[max(first, 0) : last]}

    def wanted(self, access, state_class):
        return expected(self.rules, access.region, access.offset, access.width, access.write, state_class)

    def nothing_forbidden_came(self):
        """The device's own log, whatever the client believes."""
        for came, answer in itertools.chain(
            zip(self.reached, itertools.repeat(Answer.PASS)), zip(self.trapped, itertools.repeat(Answer.TRAP))
        ):
            classes = self.classes(came.time, came.time)
            answers = {
                expected(self.rules, came.region, came.offset, len(came.data), came.write, each) for each in classes
            }
            assert answer in answers, f"{came} came in {classes}, which answer {answers}"

    def took(self, queue, access):
        """Whether the next of `queue` is this access; then it is taken out."""
        if not queue:
            return False
        came = queue[0]
        same = (came.write, came.region, came.offset) == (access.write, access.region, access.offset)
        if same and len(came.data) == access.width and came.data == access.data and access.begin <= came.time:
            queue.popleft()
            return True
        return False

    def took_kept(self, access):
        if access.write and self.kept:
            kept = self.kept[0]
            if (kept.region, kept.offset, kept.value.to_bytes(kept.width, "little")) == (
                access.region,
                access.offset,
                access.data,
            ):
                self.kept.popleft()
                for i, byte in enumerate(access.data):
                    self.stored.setdefault((access.region, access.offset + i), set()).add(byte)
                return True
        return False

    def shadow_is_right(self, access):
        """Each byte is that of the last snapshot, or one that the client had left there."""
        for at, byte in enumerate(access.data, access.offset):
            pieces = self.pieces[access.region, self.piece_of[access.region, at]]
            before = bisect.bisect_right(pieces, access.end, key=lambda piece: piece.time)
            taken = [piece.data[at - piece.offset] for piece in pieces[max(before - 1, 0) : before]]
            assert byte in {*taken} | self.stored.get((access.region, at), set()), access

    def what_became(self, access):
        """The answer that an access had, by what it left behind; a DISCARD or a refusal leaves nothing."""
        if self.took(self.reached, access):
            return Answer.PASS
        if self.took(self.trapped, access):
            return Answer.TRAP
        if self.took_kept(access):
            return Answer.SHADOW
        if access.error:
            return refusal(access.error)
        if access.write:
            return Answer.DISCARD
        return Answer.DISCARD if access.data == b"\xff" * access.width else Answer.SHADOW

    def all_was_answered_as_the_policy_says(self):
        for number, access in enumerate(self.done):
            last = access.end if access.error is not None else self.settled(number)
            classes = self.classes(access.begin, last)
            wanted = {self.wanted(access, each) for each in classes}
            became = self.what_became(access)
            if access.error is None and became is Answer.DISCARD:
                assert Answer.DISCARD in wanted or any(isinstance(one, str) for one in wanted), access
            else:
                assert became in wanted, f"{access}: {became!r}, in {classes} that answer {wanted}"
            if len(classes) == 1:
                if became is Answer.SHADOW and not access.write:
                    self.shadow_is_right(access)
                key = classes.pop(), became if isinstance(became, Answer) else "refused"
                self.sure[key] = self.sure.get(key, 0) + 1
            else:
                self.unsure += 1
        left = [*self.reached, *self.trapped, *self.kept]
        assert left == [], "came, and nobody had sent it"

    def settled(self, number):
        """When a posted write was served for sure: at the next reply, which comes after it."""
        later = (access.end for access in self.done[number + 1 :] if access.error is not None)
        return next(later, time.monotonic_ns())


@pytest.fixture
def often():
    """Three threads share the interpreter: let them take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def switch(context, state_class, kept):
    """As the session does: kept writes are taken before the device runs."""
    begin = time.monotonic_ns()
    while True:
        try:
            context.set_class(state_class)
            return Switch(begin, time.monotonic_ns(), state_class)
        except BlockingIOError:
            kept += context.take_kept_writes()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_hammered_device_sees_what_its_state_allows_and_nothing_else(often, seed):
    rules, rng, kept = policy_rules(seed, number=8), random.Random(seed), []
    presented = Presented(rules)
    ours, theirs = socket.socketpair()
    presented.context.attach(theirs.detach())
    hammer = Hammer(ours, rules, seed)
    switches = [switch(presented.context, StateClass.RUNNING, kept)]  # snapshots are taken by switches alone
    hammer.start()
    try:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and hammer.failure is None:
            at_least = len(hammer.done) + rng.randint(0, MOST_PENDING)
            while len(hammer.done) < at_least and hammer.failure is None:
                hammer.moved.clear()
                hammer.moved.wait(5)
            state_class = rng.choice([each for each in StateClass if each is not switches[-1].state_class])
            switches.append(switch(presented.context, state_class, kept))
    finally:
        hammer.stop.set()
        hammer.join(10)
        presented.context.detach()
        presented.context.join()
    assert hammer.failure is None
    assert not hammer.is_alive()
    kept += presented.context.take_kept_writes()
    verdict = Verdict(presented, switches, hammer.done, kept)
    presented.close()
    verdict.nothing_forbidden_came()
    verdict.all_was_answered_as_the_policy_says()
    classes, answers = ({key[place] for key in verdict.sure} for place in (0, 1))
    assert classes == set(StateClass)
    assert answers == {*Answer, "refused"} - {Answer.REFUSE, Answer.MMAP}
    assert len(switches) > 100
    assert len(hammer.done) > 1000
    assert verdict.unsure > 20, "nothing met a switch"
