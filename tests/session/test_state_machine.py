"""The whole server against a plain model of the kernel's state machine: whatever a client does, in any order.

A session runs in a thread with a device whose faults can be ordered; its clients set and get states, read and write
data, reset, change the device, and leave, also without waiting for an answer. What they are told, what the stream
holds and what the device was told to do must be what the model says.
"""

import errno

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.plugins_synthetic.device import FAULTS, MAILBOX, REG_CHANGE, REG_DIGEST, Shape
from tests.plugins_synthetic.in_process import InProcess
from tests.session.kernel_model import PP, RES, RP, SAVING, SC, STARTS, STOPS, P, R, S, way
from vfu_server import uapi
from vfu_server.device import StopKind
from vfu_server.libvfio_user.native import crc32c
from vfu_server.migration import FLAG_SETS
from vfu_server.stream import StreamEnd, StreamReader, StreamSection
from vfu_server.testing import ReplyError
from vfu_server.uapi import Command, Feature, MigState

PAGES, PAGE = 8, 4096
RUNS = {R, P}
ACCEPTS = {R, P, RP, PP}
EARLY = {"save early", "precopy_info"}
BESIDE = {*EARLY, "save", "save_end", "load"}
"""Faults that strike beside the client, at a time that it cannot know."""


def refusal(call, *arguments):
    """The errno that a call is refused with, 0 if it is not."""
    try:
        call(*arguments)
    except ReplyError as error:
        return error.errno
    return 0


class Machine(RuleBasedStateMachine):
    """One device and its clients, one after another; the model is `state` and what stands beside it."""

    def __init__(self):
        super().__init__()
        self.served = None
        self.client = None

    @initialize(flags=st.sampled_from(FLAG_SETS))
    def begin(self, flags):
        self.flags = flags
        shape = Shape(PAGES * PAGE, PAGE, bool(flags & uapi.MIGRATION_P2P), bool(flags & uapi.MIGRATION_PRE_COPY))
        self.served = InProcess(shape)
        self.client = self.served.connect()
        self.stream = self._save_one()
        self._fresh()

    def _save_one(self):
        """A stream that can be loaded, and the digest of the device that it came from."""
        self.client.write(0, REG_CHANGE, 4, 3)
        digest = self.client.read(0, REG_DIGEST, 8)
        self.client.set_mig_state(SC)
        data = b"".join(iter(self.client.mig_data_read, b""))
        self.client.reset()
        return data, digest

    def _fresh(self):
        """What a reset and a new client leave."""
        self.state = R
        self.generations = [0] * PAGES
        self.mailbox, self.kept = 0, []
        self.faults, self.before = [], []
        self.doubtful = False
        self._no_data()

    def _no_data(self):
        self.read, self.at_end, self.save_failed, self.lost = b"", False, False, False
        self.written, self.refused, self.finished = b"", 0, False

    @property
    def device(self):
        return self.served.device

    # --- states

    def _walk(self, target):
        """The errno of a wish, and the state that is then held; None for an errno that may be 0 as well."""
        steps = way(self.flags, self.state, target)
        if steps is None:
            return errno.EINVAL
        for there in steps:
            failed = self._arc(self.state, there)
            if failed:
                return failed
            self._arrive(there)
        return 0

    def _arc(self, here, there):
        """The errno of one arc as the device's ordered faults decide, and the state if it is ERROR."""
        if (here, there) in STOPS and self._strikes("stop"):
            return errno.EIO
        if (here, there) in STARTS:
            if self._strikes("start"):
                return errno.EIO
            return self._apply_kept()
        if (here, there) == (RES, S):
            return self._complete()
        return 0

    def _strikes(self, fault):
        if fault in self.faults:
            self.faults.remove(fault)
            return True
        return False

    def _apply_kept(self):
        """Writes of a stopped device arrive when it runs. One that fails stops it again; failing twice it is lost."""
        while self.kept:
            write = self.kept[0]
            if not self._strikes("shadow_write"):
                self.mailbox = write["value"]
            elif not write["failed"]:
                write["failed"] = True
                if self._strikes("stop"):
                    self.state = MigState.ERROR
                return errno.EIO
            self.kept.pop(0)
        return 0

    def _complete(self):
        self.finished = True
        if self.refused or self.written != self.stream[0]:
            return self.refused or errno.EINVAL
        if self._strikes("load_done"):
            self.refused = errno.EIO  # once only: nobody knows what it has left
            return errno.EIO
        self.generations = [0] * PAGES
        self.generations[3] = 1
        return 0

    def _arrive(self, there):
        if (self.state in SAVING) != (there in SAVING) or RES in (self.state, there):
            self._no_data()
            self.doubtful = False
        if there is SC:
            self.saved = list(self.generations)
            self.save_failed = "save" in self.before
        if there is P and EARLY & set(self.before):
            self.doubtful = True
        if there is RES:
            self.kept = []
        self.state = there

    @rule(wish=st.integers(0, 9))
    def wish_anything(self, wish):
        self.set_state(wish)

    @rule(wishes=st.lists(st.sampled_from(MigState), min_size=1, max_size=5))
    def wander(self, wishes):
        for wish in wishes:
            if way(self.flags, self.state, wish):
                self.set_state(wish)

    @rule(
        through=st.sampled_from([S, RP, SC, PP]),
        writes=st.lists(st.integers(0, 1000), max_size=2),
        faults=st.lists(st.sampled_from(["shadow_write", "stop", "start"]), max_size=3),
        wish=st.sampled_from([R, RP, P, PP, None]),
    )
    def stop_and_go(self, through, writes, faults, wish):
        """There and back, with writes that are kept meanwhile and faults on the way."""
        self.set_state(through)
        self.set_state(S)
        for fault in faults:
            self.order_fault(fault)
        if self.state is S:
            for value in writes:
                self.write_mailbox(value)
        if wish is None:
            self.reset()
        else:
            self.set_state(wish)

    @rule(first=st.sampled_from([P, PP, SC]), pages=st.lists(st.integers(0, PAGES - 1), max_size=3))
    def save_all(self, first, pages):
        """A whole save, of a device that changes meanwhile, up to its end or its failure."""
        self.set_state(first)
        for page in pages:
            self.mig_data_read(PAGE)
            self.change(page)
        self.set_state(SC)
        while self.state is SC and not self.at_end and not self.lost:
            self.mig_data_read(1 << 20)

    @rule(
        kept=st.booleans(),
        wish=st.sampled_from(MigState),
        cut=st.integers(0, 9),
        faults=st.lists(st.sampled_from(["load", "load_done", "start"]), max_size=1),
    )
    def load_all(self, kept, wish, cut, faults):
        """A whole load, or one that is cut short or fails, and what the client then wishes."""
        if kept:
            self.set_state(S)
            self.write_mailbox(77)
        self.set_state(RES)
        for fault in faults:
            self.order_fault(fault)
        if self.state is RES and not self.finished and self.stream[0].startswith(self.written):
            rest = self.stream[0][len(self.written) :]
            self._write(rest[: len(rest) - 1] if cut == 0 else rest)
        self.set_state(wish)

    def set_state(self, wish):
        source = self.state
        self.before = list(self.faults)
        told = refusal(self.client.feature_set, Feature.MIG_DEVICE_STATE, uapi.FEATURE_STATE.pack(wish, -1))
        held = self.client.mig_state()
        self._settle_faults()
        if self.doubtful and source is P and told == errno.EIO and held is P:
            self.faults = list(self.device.faults)
            return  # its pre-copy has failed, and so it is not stopped
        assert told == self._walk(wish), f"{source.name} to {wish}, now {held.name}"
        assert held is self.state

    def _settle_faults(self):
        """Faults that struck beside the client have been used up without it."""
        for fault in BESIDE:
            while self.faults.count(fault) > self.device.faults.count(fault):
                self.faults.remove(fault)
                if fault == "load":
                    self.refused = self.refused or errno.EIO

    @rule()
    def get_state(self):
        assert self.client.mig_state() is self.state

    @precondition(lambda self: self.state is not R)
    @rule(wish=st.sampled_from(MigState))
    def leave_without_waiting(self, wish):
        """The client wishes for a state and is gone."""
        request = uapi.DEVICE_FEATURE.pack(16, uapi.FEATURE_SET | Feature.MIG_DEVICE_STATE)
        self.client.send_message(Command.DEVICE_FEATURE, request + uapi.FEATURE_STATE.pack(wish, -1))
        self.disconnect()

    @precondition(lambda self: self.state is not R)
    @rule()
    def leave(self):
        self.disconnect()

    def disconnect(self):
        self.device.faults.clear()
        self.client.close()
        self.client = self.served.connect()
        self._fresh()

    @rule()
    def reset(self):
        told = refusal(self.client.reset)
        self._settle_faults()
        if self._strikes("reset"):
            assert told == errno.EIO
            self.kept = []
            self.state = R if self.state is R else MigState.ERROR
            self._no_data()
            return
        assert told == 0
        faults = self.faults
        self._fresh()
        self.faults = faults

    # --- the device

    @rule(page=st.integers(0, PAGES - 1))
    def change(self, page):
        told = refusal(self.client.write, 0, REG_CHANGE, 4, page)
        assert told == (0 if self.state in ACCEPTS else errno.EPERM)
        if not told:
            self.generations[page] += 1

    @rule(value=st.integers(0, 1000))
    def write_mailbox(self, value):
        told = refusal(self.client.write, 0, MAILBOX, 4, value)
        if self.state in ACCEPTS:
            self.mailbox = value
        elif self.state in (S, SC):
            self.kept.append({"value": value, "failed": False})
        assert told == (errno.EPERM if self.state in (RES, MigState.ERROR) else 0)

    @rule(fault=st.sampled_from(FAULTS[1:]))
    def order_fault(self, fault):
        self.device.faults.append(fault)
        self.faults.append(fault)
        if self.state is P and fault in EARLY:
            self.doubtful = True

    # --- data

    @rule(size=st.sampled_from([1, 100, PAGE, 1 << 20]))
    def mig_data_read(self, size):
        try:
            data = self.client.mig_data_read(size)
        except ReplyError as error:
            self._refused_read(error.errno)
            return
        assert self.state in SAVING
        self.read += data
        if not data:
            assert self.state is SC
            self._check_stream()
            self.at_end = True
        else:
            assert not self.at_end

    def _refused_read(self, told):
        self._settle_faults()
        if self.state not in SAVING:
            assert told == errno.EINVAL
        elif self.state is SC:
            assert told == errno.EIO
            assert self.save_failed
            self.lost = True
        elif told != errno.ENOMSG:
            assert told == errno.EIO
            assert self.doubtful

    def _check_stream(self):
        assert not self.save_failed
        reader = StreamReader(crc32c)
        items = reader.push(self.read)
        reader.finish()
        assert isinstance(items[-1], StreamEnd)
        pages = {}
        for item in items:
            if isinstance(item, StreamSection) and item.section.tag == "page":
                page, generation = item.section.payload[:8], item.section.payload[8:16]
                pages[int.from_bytes(page, "little")] = int.from_bytes(generation, "little")
        assert [pages[n] for n in range(PAGES)] == self.saved

    @rule(size=st.integers(1, 40_000))
    def write_of_a_stream(self, size):
        """The next bytes of a stream that is sound, or what comes after it."""
        at = len(self.written)
        self._write((self.stream[0] + b"more")[at : at + size] or b"x")

    @precondition(lambda self: self.state is RES and self.stream[0].startswith(self.written))
    @rule()
    def write_the_rest(self):
        self._write(self.stream[0][len(self.written) :])

    @rule(data=st.binary(min_size=1, max_size=100))
    def write_anything(self, data):
        self._write(data)

    def _write(self, data):
        told = refusal(self.client.mig_data_write, data)
        if self.state is not RES:
            assert told == errno.EINVAL
            return
        self._settle_faults()
        if told:  # of what was written before, or of this
            sound = self.stream[0].startswith(self.written + data)
            assert self.finished or self.refused or not sound
            assert told == (self.refused if self.refused and not self.finished else errno.EINVAL)
        else:
            assert not self.finished
        if not self.finished:
            self.written += data

    # --- questions

    @rule()
    def precopy_info(self):
        told = refusal(self.client.feature_get, Feature.MIG_PRECOPY_INFO, b"", 24)
        self._settle_faults()
        if self.state not in (P, PP):
            assert told == errno.EINVAL
        else:
            assert told == 0 or (told == errno.EIO and (self.doubtful or self.state is PP))

    @rule()
    def data_size(self):
        told = refusal(self.client.mig_data_size)
        assert told == (errno.EIO if self._strikes("estimate") else 0)

    @invariant()
    def the_device_is_what_the_state_says(self):
        if self.client is None:
            return
        assert self.device.broken == []
        wanted = set()
        if self.state in (RP, PP, S, SC, RES) and self.flags & uapi.MIGRATION_P2P:
            wanted.add(StopKind.P2P)
        if self.state in (S, SC, RES):
            wanted.add(StopKind.FULL)
        if self.state is not MigState.ERROR:
            assert self.device.stopped == wanted
        if self.state in ACCEPTS:
            assert (self.device.mailbox, self.device.generations) == (self.mailbox, self.generations)

    def teardown(self):
        if self.client is not None:
            self.device.faults.clear()
            self.client.close()
        if self.served is not None:
            self.served.close()
            assert self.device.broken == []
            assert self.device.stopped == set()


def check(examples, steps):
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_what_a_client_is_told_is_what_the_kernel_would_tell():
    check(15, 25)


@pytest.mark.slow
@pytest.mark.deadline(600)
def test_what_a_client_is_told_is_what_the_kernel_would_tell_in_many_ways():
    check(400, 60)
