"""What does not fit is refused while the guest still runs; what fails is named, and the guest goes on."""

import errno
from contextlib import ExitStack

import pytest

from plugins.hns.registers import HALF, MAILBOX, QM_REGION
from tests.end_to_end.served import until
from tests.model_process import ModelProcess
from tests.plugins.hns.served import MODULE, SECONDS, Served, arrival, at_work
from tests.server.programs import run
from vfu_server.testing import ReplyError, migrate_guest, save
from vfu_server.uapi import REGION_INFO_FLAG_MMAP, MigState

RUNNING, STOP, STOP_COPY = MigState.RUNNING, MigState.STOP, MigState.STOP_COPY


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("zip", "--queues", "8"), "the state is of 16 queues, this device has 8"),
        (("zip", "--no-doorbell-isolation"), "queue isolation 0x1, this device has 0x0"),
        (("zip", "--revision", "0x50"), "revision 0x30"),
        (("zip", "--sub-version", "0x50"), "variant 'zip V3', this device has 'zip V4'"),
        (("sec",), "a256"),
    ],
    ids=["queue count", "isolation", "revision", "generation", "device"],
)
def test_a_target_that_does_not_fit_is_found_before_any_downtime(folder, other, words):
    with Served(folder / "a") as source, Served(folder / "b", *other) as target, ExitStack() as stack:
        here, traffic = at_work(stack, source)
        traffic.run_entries(20)
        traffic.submit()
        source.forget()
        with pytest.raises(ReplyError) as refused:
            migrate_guest(here, stack.enter_context(arrival(target)))
        assert "migration failed in step 'pre-copy data'" in refused.value.__notes__
        assert "PRE_COPY -> STOP_COPY" not in source.said(), "the guest never stood still"
        until(lambda: words in target.said(), words, SECONDS)
        traffic.run_entries(20)
        assert traffic.finish().in_flight == 0


def test_every_session_is_checked(folder):
    """The kernel's driver remembers that a check was passed; here each session has its own."""
    with ExitStack() as stack:
        fits, odd, target = (
            stack.enter_context(Served(folder / name, "zip", "--queues", queues))
            for name, queues in (("a", "16"), ("b", "8"), ("c", "16"))
        )
        streams = []
        for server in (fits, odd):
            guest = stack.enter_context(server.connect()).start()
            guest.client.set_mig_state(STOP_COPY)
            streams.append(b"".join(save(guest.client)))
        there = stack.enter_context(arrival(target))
        there.client.set_mig_state(MigState.RESUMING)
        there.client.mig_data_write(streams[0])
        there.client.set_mig_state(STOP)
        there.client.set_mig_state(MigState.RESUMING)
        with pytest.raises(ReplyError):
            there.client.mig_data_write(streams[1])
        with pytest.raises(ReplyError):
            there.client.set_mig_state(STOP)
        assert there.client.mig_state() is MigState.RESUMING
        until(lambda: "8 queues" in target.said(), "the reason in the log", SECONDS)
        there.client.reset()
        assert there.client.mig_state() is RUNNING


@pytest.mark.parametrize(
    ("fault", "times", "number", "words"),
    [
        ("mailbox-busy", -1, errno.ETIMEDOUT, "mailbox: it is still busy after 1 s"),
        ("mailbox-error", 1, errno.EIO, "mailbox: get SQC VFT failed with status 0x1"),
        ("mailbox-stuck", 1, errno.ETIMEDOUT, "mailbox: get SQC VFT has not ended after 1 s"),
        ("write-back-stuck", 1, errno.ETIMEDOUT, "the write-back of queue contexts is not done after 1 s"),
        ("message-waiting", -1, errno.EBUSY, "a message between it and its PF is under way (ifc_int_status"),
        ("message-unanswered", -1, errno.EBUSY, "a message between it and its PF is under way (ifc_int_set"),
    ],
)
def test_a_stop_that_fails_names_the_operation_and_the_guest_goes_on(folder, fault, times, number, words):
    with Served(folder / "a") as server, ExitStack() as stack:
        here, traffic = at_work(stack, server)
        traffic.run_entries(20)
        traffic.submit()
        server.fault(fault, times)
        with pytest.raises(ReplyError) as refused:
            here.client.set_mig_state(STOP)
        assert refused.value.errno == number
        assert here.client.mig_state() is RUNNING
        until(lambda: words in server.said(), words, SECONDS)
        server.fault(fault, 0)
        traffic.run_entries(20)
        assert traffic.finish().in_flight == 0
        if fault not in ("mailbox-stuck", "write-back-stuck"):  # those last until a reset, as told
            here.client.set_mig_state(STOP_COPY)
            here.client.set_mig_state(RUNNING)
            traffic.run_entries(20)
            assert traffic.finish().in_flight == 0


@pytest.mark.parametrize(("fault", "register"), [("ras-error", "qm_error_status"), ("core-error", "core_status")])
def test_an_error_of_the_device_that_only_the_pf_shows_keeps_it_from_moving(folder, fault, register):
    with Served(folder / "a") as server, ExitStack() as stack:
        here, traffic = at_work(stack, server)
        traffic.run_entries(20)
        server.pf_fault(fault, -1)
        with pytest.raises(ReplyError) as refused:
            here.client.set_mig_state(STOP)
        assert refused.value.errno == errno.EBUSY
        until(lambda: f"has an error ({register}" in server.said(), register, SECONDS)
        server.pf_fault(fault, 0)
        traffic.run_entries(20)
        assert traffic.finish().in_flight == 0
        here.client.set_mig_state(STOP_COPY)
        here.client.set_mig_state(RUNNING)
        traffic.run_entries(20)


def test_the_migration_half_does_not_exist_for_the_guest(pair):
    source, _ = pair
    with source.connect() as guest:
        guest.start()
        info = guest.regions[QM_REGION]
        assert info.size == HALF
        assert not info.flags & REGION_INFO_FLAG_MMAP
        for offset in (HALF, HALF + 0x20, 2 * HALF - 4, HALF - 2):
            with pytest.raises(ReplyError) as refused:
                guest.client.region_read(QM_REGION, offset, 4)
            assert refused.value.errno == errno.EINVAL
            with pytest.raises(ReplyError):
                guest.client.region_write(QM_REGION, offset, bytes(4))


def test_the_mailbox_is_busy_for_a_guest_while_it_is_ours(pair):
    source, _ = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        here.client.set_mig_state(STOP)
        assert here.client.read(QM_REGION, MAILBOX, 4) == 1 << 13
        assert here.client.read(QM_REGION, MAILBOX + 1, 1) == 1 << 5
        commands = source.model.control("state")["registers"]["mailbox0"]
        for at, size in ((0, 16), (0, 8), (8, 8), (12, 4)):
            with pytest.raises(ReplyError) as refused:
                here.client.region_write(QM_REGION, MAILBOX + at, b"\x0e\x20" + bytes(size - 2))
            assert refused.value.errno == errno.EBUSY
        assert source.model.control("state")["registers"]["mailbox0"] == commands
        here.client.set_mig_state(RUNNING)
        traffic.run_entries(20)
        assert traffic.finish().in_flight == 0


def test_a_doorbell_that_comes_late_is_kept(pair):
    source, _ = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        traffic.run_entries(10)
        here.client.set_mig_state(STOP)
        traffic.submit()  # a vCPU that the VMM forgot to stop
        here.client.set_mig_state(RUNNING)
        assert traffic.finish().in_flight == 0


@pytest.mark.parametrize("model", [("zip", "--revision", "0x21"), ("zip", "--mode", "pf-ctrl", "--revision", "0x50")])
def test_what_cannot_be_migrated_is_served_and_says_why(folder, model):
    options = ("--option", "pf=none")
    with Served(folder / "a", *model, options=options) as server, ExitStack() as stack:
        said = "V3 or later is needed" if "0x21" in model else "through its PF only"
        here = stack.enter_context(server.connect()).start()
        assert said in server.said()
        with pytest.raises(ReplyError):
            here.client.set_mig_state(STOP_COPY)


def test_mode_pf_ctrl_needs_the_number_of_the_vf(folder):
    with ModelProcess(folder, "zip", "--mode", "pf-ctrl", "--revision", "0x50", module=MODULE) as model:
        done = run("--plugin", "hns", "--device-socket", model.path, "--socket-path", folder / "served.sock")
    assert done.returncode
    assert "--option vf=N says which VF it is" in done.stderr
    assert "Traceback" not in done.stderr
