"""The whole of it: two servers, each with a card in software and our own driver of its physical function, and a guest
whose frames go on while it moves.
"""

import contextlib

import pytest

from plugins.mlx5.models.traffic import Traffic
from tests.end_to_end.served import Process, until
from tests.plugins.mlx5.served import MB, GuestPort, Served, card_of, card_state, server_of, two
from tests.plugins.mlx5_model.raw import Raw
from tests.plugins.mlx5_model.test_eswitch import UNICAST, wanting
from vfu_server.testing import Guest, GuestMemory, migrate_guest, save
from vfu_server.testing.client import dirty_pages
from vfu_server.testing.wire import ReplyError
from vfu_server.uapi import MigState


@pytest.mark.deadline(300)
@pytest.mark.parametrize("pre_copy", [True, False])
@pytest.mark.parametrize("arguments", [("--image-size", "3M"), ("--no-chunks",)], ids=["chunks", "one-image"])
def test_a_function_moves_with_its_frames(tmp_path, arguments, pre_copy):
    """Memory is copied by what the firmware's log of pages says, so a page that it forgets is a wrong frame."""
    with two(tmp_path, *arguments) as (first, second), first.guest() as here, second.guest() as there:
        here.start()
        here.enable_msix(8)
        traffic = Traffic(GuestPort(here), pairs=(0, 3))
        traffic.start()
        traffic.generate(3, 200_000, 300)
        traffic.run(70)
        traffic.post(20)
        there.plug_in()
        there.machine_reset()
        record = migrate_guest(here, there, pre_copy=pre_copy)
        assert record.stop_copy_bytes
        assert (record.pre_copy_bytes > 0) == pre_copy
        assert 8 * MB < record.memory_bytes < 16 * MB
        traffic.moved(GuestPort(there))
        traffic.finish()
        traffic.run(70)
        for side in (first, second):
            assert side.registers["flow_entries"] > 0
            assert side.server.end()[0] == 0, side.server.log
            assert "Traceback" not in side.server.log
            left = side.registers
            for what in ("violations", "stage", "mkeys", "pds", "eqs", "uars", "trackers", "flow_tables"):
                assert left[what] == 0, (what, left)


class QueuePort(GuestPort):
    """For a guest's own command queue."""

    def wait(self, until, what="a command", seconds=60.0):
        super().wait(until, what)


@pytest.mark.deadline(300)
def test_what_a_guest_wants_to_hear_is_let_in_here_and_where_it_goes(tmp_path):
    """Its driver's lists change by event 0x0d, and by a state that comes in; the e-switch follows."""
    with two(tmp_path) as (first, second), first.guest() as here, second.guest() as there:
        here.start()
        before = {side: side.registers["flow_entries"] for side in (first, second)}
        queue = Raw(QueuePort(here), start=4 * MB, end=8 * MB)
        queue.power_on()
        queue.command(wanting(UNICAST, 0x02AA, 0x02BB, 0x02CC))
        until(lambda: first.registers["flow_entries"] == before[first] + 3, "rules of its three addresses")
        queue.command(wanting(UNICAST, 0x02AA, 0x02BB))
        until(lambda: first.registers["flow_entries"] == before[first] + 2, "the event asked for again")
        there.plug_in()
        there.machine_reset()
        migrate_guest(here, there)
        until(lambda: second.registers["flow_entries"] == before[second] + 2, "the same rules over there")
        here.client.reset()
        until(lambda: first.registers["flow_entries"] == before[first], "no rules for what is not there any more")
        assert first.registers["violations"] == second.registers["violations"] == 0


@pytest.mark.deadline(300)
def test_a_migration_that_is_given_up_leaves_the_guest_running(tmp_path):
    with Served(tmp_path / "a") as first, first.guest() as here:
        here.start()
        traffic = Traffic(GuestPort(here))
        traffic.start()
        traffic.run(10)
        for last in (MigState.PRE_COPY, MigState.PRE_COPY_P2P, MigState.STOP_COPY, MigState.STOP):
            for state in (MigState.PRE_COPY, last):
                if (state, last) != (MigState.PRE_COPY, MigState.STOP):
                    here.client.set_mig_state(state)
            if last is MigState.PRE_COPY:
                with contextlib.suppress(ReplyError):
                    here.client.mig_data_read(4096)
            here.client.set_mig_state(MigState.RUNNING)
            traffic.run(10)
        assert first.registers["violations"] == 0


@pytest.mark.deadline(300)
def test_firmware_faults_have_names_and_the_guest_goes_on(tmp_path):
    with Served(tmp_path / "a") as first, first.guest() as here:
        here.start()
        traffic = Traffic(GuestPort(here))
        traffic.start()
        traffic.run(10)
        for fault in ("status:0x115:4:0x77", "delivery:0x115:2", "bad-token"):
            first.order(fault)
            with pytest.raises(ReplyError):
                here.client.set_mig_state(MigState.STOP)
            here.client.set_mig_state(MigState.RUNNING) if fault != "bad-token" else here.client.reset()
        log = first.server.said()
        assert "SUSPEND_VHCA failed: status 0x4 (bad system state), syndrome 0x00000077" in log
        assert "SUSPEND_VHCA was not delivered: status 0x2 (token error)" in log
        assert "came back with another token" in log


@pytest.mark.deadline(300)
def test_a_damaged_image_is_refused_by_the_firmware(tmp_path):
    with two(tmp_path) as (first, second), first.guest() as here, second.guest() as there:
        here.start()
        there.plug_in()
        there.machine_reset()
        traffic = Traffic(GuestPort(here))
        traffic.start()
        traffic.run(10)
        first.order("bit-flip")
        with pytest.raises(ReplyError):
            migrate_guest(here, there, pre_copy=False)
        traffic.run(10)
        assert "LOAD_VHCA_STATE failed" in second.server.said()


@pytest.mark.deadline(300)
def test_other_firmware_is_refused_before_its_state(tmp_path):
    with (
        Served(tmp_path / "a") as first,
        Served(tmp_path / "b", "--psid", "MT_0000000001") as second,
        first.guest() as here,
        second.guest() as there,
    ):
        here.start()
        there.plug_in()
        there.machine_reset()
        with pytest.raises(ReplyError):
            migrate_guest(here, there)
        assert "PSID" in second.server.said()
        assert second.registers["violations"] == 0


@pytest.mark.deadline(300)
def test_a_card_that_cannot_is_served_and_says_why(tmp_path):
    with Served(tmp_path / "a", "--cap", "migration_multi_load=0") as first, first.guest() as here:
        here.start()
        assert here.client.migration_flags() == 0
        assert first.server.said().count("lacks: migration_multi_load (") == 1


@pytest.mark.deadline(300)
def test_functions_of_one_card_share_a_process_and_another_process_is_refused(tmp_path):
    config = tmp_path / "two.toml"
    with card_of(tmp_path, "--vfs", "3") as card:
        devices = []
        for number in (0, 1):
            where = card.path if not number else f"{card.path}.vf{number}"
            devices.append(
                f'[[device]]\nname = "vf{number}"\nplugin = "mlx5"\ndevice-socket = "{where}"\n'
                f'socket-path = "{tmp_path}/s{number}"\noptions = {{pf = "{card.path}.pf", vf = "{number}"}}\n'
            )
        config.write_text("\n".join(devices))
        with Process("--config", config, devices=2) as server, contextlib.ExitStack() as stack:
            guests = [stack.enter_context(Guest.connect(f"{tmp_path}/s{n}", GuestMemory.of(8 * MB))) for n in (0, 1)]
            traffics = [Traffic(GuestPort(guest.start())) for guest in guests]
            for traffic in traffics:
                traffic.start()
                traffic.run(5)
            guests[0].client.set_mig_state(MigState.STOP_COPY)
            traffics[1].run(5)
            assert b"".join(save(guests[0].client))
            guests[0].client.set_mig_state(MigState.RUNNING)
            traffics[0].run(5)
            with Process(*server_of(card, 2, f"{tmp_path}/s2")) as other:
                with Guest.connect(f"{tmp_path}/s2", GuestMemory.of(MB)) as lone:
                    assert lone.client.migration_flags() == 0
                assert "another process holds it" in other.wait_log("cannot be migrated: physical function")
                assert other.end()[0] == 0
            traffics[0].run(5)
            stack.close()
            assert server.end()[0] == 0, server.log
            assert server.log.count("physical function up") == 1
        assert card_state(card)["violations"] == 0


@pytest.mark.deadline(300)
@pytest.mark.parametrize("fault", ["health:1", "health-stuck"])
def test_a_card_that_dies_is_brought_up_again_and_its_function_reset(tmp_path, fault):
    with Served(tmp_path / "a") as first, first.guest() as here:
        here.start()
        here.client.set_mig_state(MigState.PRE_COPY)
        first.order(fault, -1 if fault == "health-stuck" else 1)
        first.server.wait_log("is dead", 60)
        first.order(fault, 0)
        first.server.wait_log("it is up again", 60)
        with pytest.raises(ReplyError):
            here.client.set_mig_state(MigState.STOP_COPY)
        here.client.reset()
        here.client.set_mig_state(MigState.STOP_COPY)
        assert b"".join(save(here.client))
        here.client.set_mig_state(MigState.RUNNING)


@pytest.mark.deadline(300)
def test_a_log_that_is_lost_counts_everything(tmp_path):
    with Served(tmp_path / "a") as first, first.guest() as here:
        here.start()
        here.client.dma_logging_start([(0, 8 * MB)])
        traffic = Traffic(GuestPort(here))
        traffic.start()
        traffic.run(5)
        first.order("tracker-error")
        with pytest.raises(ReplyError):
            here.client.dma_logging_report(0, 8 * MB)
        with pytest.raises(ReplyError):
            here.client.dma_logging_report(0, 8 * MB)
        here.client.dma_logging_stop()
        here.client.dma_logging_start([(0, 8 * MB)])
        traffic.run(5)
        written = dirty_pages(here.client.dma_logging_report(0, 8 * MB), 0)
        assert 0 < len(list(written)) < 100
        assert not list(dirty_pages(here.client.dma_logging_report(0, 8 * MB), 0))
        here.client.dma_logging_stop()
        assert first.registers["violations"] == 0
