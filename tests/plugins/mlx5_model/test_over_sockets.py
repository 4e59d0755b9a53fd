"""A card as a process: booted, a VF moved to another card while a guest sends frames, all over sockets."""

import pytest

from plugins.mlx5.models.traffic import Traffic
from tests.plugins.mlx5_model.raw import Buffer, Raw
from tests.plugins.mlx5_model.socket_port import CardProcess
from vfu_server.testing import GuestMemory

MB = 1 << 20


def drive(card: CardProcess) -> Raw:
    return Raw(card.pf, end=60 << 20).boot()


@pytest.mark.deadline(300)
def test_vf_moves_with_its_traffic(tmp_path):
    """The guest's memory is one file, as if it had been copied; the state goes in one image and two later ones."""
    memory = GuestMemory.of(8 * MB)
    with (
        CardProcess(tmp_path / "a", "--no-chunks", guest_memory=memory) as first,
        CardProcess(tmp_path / "b", "--no-chunks", guest_memory=memory) as second,
    ):
        source, target = drive(first), drive(second)
        here, there = source.enable_vf(), target.enable_vf()
        traffic = Traffic(first.vfs[0], pairs=(0, 3))
        traffic.start()
        traffic.run(70)
        assert first.vfs[0].interrupts(1)
        buffer, other = Buffer(source, 2 * MB), Buffer(target, 2 * MB, big=False)
        images = [source.save(here, buffer, track=True)[0]]
        traffic.post(20)
        images.append(source.save(here, buffer, inc=True, track=True)[0])
        traffic.post(30)
        source.stop(here)
        images += source.save_all(here, buffer, inc=True, chunk=False)
        target.stop(there)
        for image in images:
            target.load(there, other, image)
        target.go(there)
        traffic.moved(second.vfs[0])
        traffic.finish()
        traffic.run(70)
        source.settle()
        assert len(traffic.contexts) > 20
        assert (first.violations, second.violations) == (0, 0)


def test_device_reset_of_the_pf_forgets_everything(tmp_path):
    """Who comes next finds a card that was never booted, and boots it."""
    with CardProcess(tmp_path) as card:
        drive(card).enable_vf()
        assert card.state()["vf[0].enabled"] == 1
        card.pf.guest.client.reset()
        card.pf.guest.firmware()
        state = card.state()
        assert (state["stage"], state["vf[0].enabled"], state["eqs"]) == (0, 0, 0)
        drive(card).enable_vf()
        assert (card.state()["vf[0].enabled"], card.violations) == (1, 0)


@pytest.mark.deadline(300)
def test_memory_by_messages_and_a_suspend_in_the_middle(tmp_path):
    """Each access of the engine waits for the guest: a suspend ends when the one that is on its way has ended."""
    memory = GuestMemory()
    memory.add(0, 8 * MB, shared=False)
    with CardProcess(tmp_path, guest_memory=memory) as card:
        raw = drive(card)
        vhca = raw.enable_vf()
        card.pf.others.append(card.vfs[0])
        traffic = Traffic(card.vfs[0], pairs=(0, 1))
        traffic.start()
        traffic.run(10)
        for _ in range(3):
            traffic.post(20)
            raw.suspend(vhca, 0)
            before = memory.read(0, 8 * MB)
            for _ in range(20):
                card.vfs[0].guest.client.serve(0.001)
            assert memory.read(0, 8 * MB) == before, "a suspended function writes nothing"
            raw.suspend(vhca, 1)
            raw.go(vhca)
            traffic.finish()
        state = card.state()
        assert (state["violations"], state["guest_violations"]) == (0, 0)
