"""A VF under load between two real servers: every entry exactly once, whatever becomes of the migration."""

from contextlib import ExitStack

import pytest

from plugins.hns.blob import SIZE, decode_match, decode_state
from plugins.hns.models.traffic import Traffic
from plugins.hns.registers import MAILBOX, QM_REGION
from tests.plugins.hns.served import MEMORY, Served, arrival, at_work
from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import Origin, StreamReader, StreamSection
from vfu_server.testing import GuestMemory, migrate_guest, save
from vfu_server.uapi import MigState

RUNNING, STOP, STOP_COPY = MigState.RUNNING, MigState.STOP, MigState.STOP_COPY


def move(stack: ExitStack, here, traffic: Traffic, server: Served, **how):
    """The guest goes on at `server`; the guest there."""
    there = stack.enter_context(arrival(server))
    migrate_guest(here, there, **how)
    here.close()
    traffic.move(there, there.interrupts)
    return there


def there_and_back(pair, times: int, **how) -> None:
    source, target = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source, **how)
        traffic.run_entries(30)
        for n in range(times):
            traffic.submit()
            # Memory goes with the guest by copy once, and is shared the other times: both are what VMMs do.
            here = move(stack, here, traffic, (target, source)[n % 2], pre_copy=n % 3 != 2)
            traffic.run_entries(30)
        count = traffic.finish()
        assert count.submitted == count.completed >= 30 * (times + 1)
        traffic.driver.stop()


def test_there_and_back_under_load(pair):
    there_and_back(pair, 4)


@pytest.mark.slow
@pytest.mark.deadline(900)
def test_a_hundred_times_under_load(pair):
    there_and_back(pair, 100)


@pytest.mark.parametrize(
    ("model", "options", "how", "generation"),
    [
        (("sec",), (), {"kind": "sec", "isolation": True}, "V3 (Kunpeng 930)"),
        (("hpre", "--no-doorbell-isolation"), (), {"kind": "hpre"}, "V3 (Kunpeng 930)"),
        (("zip", "--revision", "0x50"), (), {"halves": True}, "V4"),
        (("zip", "--revision", "0x51", "--mode", "pf-ctrl", "--vfs", "2"), ("--option", "vf=0"), {}, "V5"),
        (("zip", "--sub-version", "0x51", "--mode", "pf-ctrl"), ("--option", "vf=0"), {"isolation": True}, "V5"),
        (("zip",), ("--option", "pf=none"), {}, ""),
    ],
    ids=["sec", "hpre", "V4, the mailbox in halves", "V5, PF_CTRL", "V5 by its sub-version, PF_CTRL", "without PF"],
)
def test_every_kind_generation_and_mode(folder, model, options, how, generation):
    with (
        Served(folder / "a", *model, options=options) as source,
        Served(folder / "b", *model, options=options) as target,
    ):
        there_and_back((source, target), 2, **how)
        assert ("errors of the device (RAS) are not looked at" in source.said()) == ("pf=none" in options)
        assert (f"is the PF of a {model[0]}, {generation}\n" in source.said()) != ("pf=none" in options)


def test_a_migration_that_is_given_up_loses_nothing(pair):
    source, _ = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        for state in (STOP, STOP_COPY, MigState.PRE_COPY, STOP_COPY):
            traffic.run_entries(20)
            traffic.submit()
            here.client.set_mig_state(state)
            if state is STOP_COPY:
                assert b"".join(save(here.client))
            here.client.set_mig_state(RUNNING)
        traffic.run_entries(20)
        count = traffic.finish()
        assert count.submitted == count.completed


def test_a_target_that_is_given_up_after_it_got_the_state_leaves_the_source_whole(pair):
    source, target = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        traffic.run_entries(20)
        traffic.submit()
        there = stack.enter_context(arrival(target))
        here.client.set_mig_state(STOP_COPY)
        stream = b"".join(save(here.client))
        there.client.set_mig_state(MigState.RESUMING)
        there.client.mig_data_write(stream)
        there.client.set_mig_state(STOP)
        there.client.reset()
        here.client.set_mig_state(RUNNING)
        traffic.run_entries(20)
        assert traffic.finish().in_flight == 0
        # The one that was reset is as new: another guest uses it.
        with ExitStack() as other:
            there.close()
            _, second = at_work(other, target)
            second.run_entries(20)
            assert second.finish().in_flight == 0


def sections(stream: bytes) -> dict[str, bytes]:
    """The plugin's payloads, by tag, in one piece each."""
    reader = StreamReader(crc32c)
    items = [item for item in reader.push(stream) if isinstance(item, StreamSection) and item.origin is Origin.PLUGIN]
    found: dict[str, bytes] = {}
    for item in items:
        found[item.section.tag] = found.get(item.section.tag, b"") + item.section.payload
    return found


def test_the_state_is_the_kernels_blob(pair):
    source, _ = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        traffic.run_entries(20)
        traffic.finish()
        here.client.set_mig_state(STOP_COPY)
        found = sections(b"".join(save(here.client)))
        registers = source.model.control("state")["registers"]
        here.client.set_mig_state(RUNNING)
        blob = found["kernel"]
        assert len(blob) == SIZE
        match, state = decode_match(blob), decode_state(blob)
        assert (match.queues, match.device, match.first_queue) == (16, 0xA251, 64)
        layout = traffic.driver.layout
        assert (state.eqe, state.aeqe) == (layout.eq, layout.aeq)
        assert (state.sqc, state.cqc) == (layout.sqc_table, layout.cqc_table)
        assert state.eqc[6] & 0xFFFF == layout.eq_depth - 1
        assert state.eqc[0] & 0xFFFF == traffic.driver.eq_head
        assert registers["paused"] >= 4 if "paused" in registers else True
        assert len(found["mailbox"]) == 16


def test_a_function_without_driver_has_forty_bytes_and_starts_anywhere(pair):
    source, target = pair
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory.of(MEMORY))
        here = stack.enter_context(source.connect(memory)).start()
        here.client.set_mig_state(STOP_COPY)
        stream = b"".join(save(here.client))
        assert len(sections(stream)["kernel"]) == 40
        assert decode_match(sections(stream)["kernel"]).state == 1
        here.client.set_mig_state(RUNNING)
        there = stack.enter_context(arrival(target))
        record = migrate_guest(here, there)
        assert record.pre_copy_bytes > 40
        there.firmware()
        for guest in (there,):
            traffic = Traffic(guest, timeout=60.0)
            traffic.run_entries(20)
            assert traffic.finish().in_flight == 0
        here.client.set_mig_state(RUNNING)
        traffic = Traffic(here, timeout=60.0)  # nor is the source held back for ever
        traffic.run_entries(20)
        assert traffic.finish().in_flight == 0


def test_a_driver_that_was_unloaded_is_loaded_again_after_the_move(pair):
    source, target = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        traffic.run_entries(20)
        traffic.finish()
        traffic.driver.stop()
        there = stack.enter_context(arrival(target))
        migrate_guest(here, there)
        there.firmware()
        again = Traffic(there, timeout=60.0)
        again.run_entries(20)
        assert again.finish().in_flight == 0
        here.client.set_mig_state(RUNNING)
        again = Traffic(here, timeout=60.0)
        again.run_entries(20)
        assert again.finish().in_flight == 0


def test_the_guest_reads_the_end_of_its_own_command(pair):
    source, target = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        word = traffic.driver.command(6, get=True)
        assert word

        def words(guest) -> bytes:
            return guest.client.region_read(QM_REGION, MAILBOX, 16)

        before = words(here)
        here.client.set_mig_state(STOP_COPY)
        assert words(here)[:2] == b"\x00\x20", "busy while it is ours"
        here.client.set_mig_state(RUNNING)
        assert words(here) == before
        there = move(stack, here, traffic, target)
        assert words(there) == before
        assert traffic.driver.command(6, get=True) == word
        traffic.run_entries(20)
        assert traffic.finish().in_flight == 0


def test_a_machine_that_is_reset_begins_anew(pair):
    source, _ = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        traffic.run_entries(20)
        traffic.submit()
        here.machine_reset()
        here.firmware()
        again = Traffic(here, timeout=60.0)
        again.run_entries(20)
        assert again.finish().in_flight == 0
