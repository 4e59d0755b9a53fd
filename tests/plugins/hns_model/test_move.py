"""Pause, save, restore and start by registers alone: work goes on elsewhere, nothing is lost; a wrong move shows."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.hns.models.guest_driver import DeviceError
from plugins.hns.models.traffic_work import COPY, DEFLATE
from tests.plugins.hns_model.mover import Saved, Window, load, move, save, start, stop
from tests.plugins.hns_model.rig import Accelerator, BusPort, Load, counted


class PfPort(BusPort):
    """The PF's registers, while time goes on for the VF too."""

    def __init__(self, device: Accelerator) -> None:
        super().__init__(device.pf, device.buses["pf"])
        self._device = device

    def pause(self) -> None:
        super().pause()
        self._device.bus.step(1e-5)


def window(device: Accelerator) -> Window:
    if device.vf.shared.pf_ctrl:
        return Window(PfPort(device), 0x180000 + 0x2000, 0x1C00, 0x1C20)
    return Window(device.port)


def pair(kind: str = "zip", **order: object) -> tuple[Accelerator, Accelerator]:
    return Accelerator(kind, **order), Accelerator(kind, **order)  # type: ignore[arg-type]


MODES = [{}, {"revision": 0x50, "pf_ctrl": True}, {"revision": 0x51}, {"sub_version": 0x51, "pf_ctrl": True}]


@pytest.mark.parametrize("mode", MODES, ids=["V3", "V4 PF_CTRL", "V5", "V5 PF_CTRL, revision 0x30"])
@pytest.mark.parametrize("kind", ["zip", "sec", "hpre"])
def test_work_goes_on_elsewhere(kind: str, mode: dict[str, object]) -> None:
    source, target = pair(kind, queues=4, entry_seconds=0.01, **mode)
    work = Load(source, queues=4, depth=8, operation=DEFLATE if kind == "zip" else COPY)
    for queue in range(4):
        work.submit(queue, 3 + queue)
    source.bus.step(0.025)
    work.handle()
    saved = move(window(source), window(target))
    assert saved.queues == 4
    work.move(target)
    start(window(target), saved.queues)
    work.finish()
    done = [device.vf.state()["completed"] for device in (source, target)]
    assert sum(done) == work.completed == 3 + 4 + 5 + 6
    assert min(done) > 0
    work.fill()
    work.finish()
    assert work.completed == 18 + 4 * 7
    assert counted(source.vf) == counted(target.vf) == {}
    assert counted(source.pf) == counted(target.pf) == {}


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 40)), min_size=1, max_size=6),
    moves=st.integers(1, 3),
)
def test_nothing_is_lost_wherever_it_is_stopped(counts: list[tuple[int, int]], moves: int) -> None:
    device = Accelerator(queues=2, entry_seconds=1e-4)
    work = Load(device, queues=2, depth=8)
    for _ in range(moves):
        for number, (entries, steps) in enumerate(counts):
            queue = number % 2
            work.submit(queue, min(entries, work.driver.room(queue)))
            device.bus.step(steps * 2.5e-5)
            if steps % 3 == 0:
                work.handle()
        target = Accelerator(queues=2, entry_seconds=1e-4)
        saved = move(window(device), window(target))
        work.move(target)
        start(window(target), saved.queues)
        assert counted(device.vf) == counted(target.vf) == {}
        device = target
    work.finish()
    assert work.completed == sum(work.numbers)


def test_pause_finishes_what_is_at_hand_and_begins_nothing() -> None:
    device = Accelerator(entry_seconds=0.01)
    work = Load(device, queues=2)
    work.submit(0, 2)
    work.submit(1, 1)
    device.bus.step(0.005)
    stop(window(device))
    assert device.vf.state()["completed"] == 2
    work.submit(1, 3)
    device.bus.run()
    assert device.vf.state()["completed"] == 2
    assert device.vf.state()["queue[1].sq_tail"] == 4
    assert device.vf.state()["paused"] == 16
    work.handle()
    for queue in range(16):
        device.write(0x1000, queue | 1 << 48, 8)
    work.finish()
    assert work.completed == 6
    assert device.vf.state()["paused"] == 0
    assert counted(device.vf) == {}


def test_a_restart_ends_the_pause_of_one_queue() -> None:
    device = Accelerator()
    work = Load(device, queues=2)
    stop(window(device))
    work.submit(0)
    work.submit(1)
    device.write(0x1000, 1 | 1 << 48, 8)
    device.bus.run()
    assert device.vf.state()["completed"] == 1
    assert device.vf.state()["paused"] == 15
    device.write(0x1000, 1 << 48, 8)
    work.finish()


def test_the_save_tells_again_what_nobody_has_read() -> None:
    source = Accelerator()
    work = Load(source, queues=1)
    work.submit(0, 3)
    source.bus.run()
    assert source.bus.take_messages() == [0]  # lost on its way
    stop(window(source))
    save(window(source))
    assert source.bus.messages == [0]
    assert work.handle()
    assert work.completed == 3


def test_an_event_asked_for_while_paused_comes_after_the_start() -> None:
    source, target = pair()
    work = Load(source, queues=1)
    work.submit(0, 2)
    source.bus.run()
    source.bus.take_messages()
    completions = work.driver.completions(0)
    work.driver.events()
    next(completions)
    stop(window(source), write_back=False)
    source.write(0x1000, 0x0001000100001000, 8)  # next to read 1 of 2, event wanted
    source.bus.run()
    assert source.vf.state()["eqc.written"] == 1
    saved = move(window(source), window(target))
    work.move(target)
    start(window(target), saved.queues)
    target.bus.run()
    assert target.vf.state()["eqc0"] >> 16 == 2
    assert target.bus.messages == [0]


@pytest.mark.parametrize("damage", [False, True])
def test_the_error_ring_goes_along(damage: bool) -> None:
    source, target = pair()
    work = Load(source, queues=8)
    for queue in range(5):  # over the end of a ring of four
        source.vf.faults.armed["cqe-error"] = 1
        work.submit(queue)
        source.bus.run()
        assert work.driver.errors() == [(queue, 2)]
        work.driver.command(8, queue=queue)  # as the driver does; else it would be tried again at the target
    stop(window(source))
    saved = save(window(source))
    if damage:
        saved.aeqc = [0, *saved.aeqc[1:]]
    stop(window(target))
    load(window(target), saved)
    work.move(target)
    target.vf.faults.armed["cqe-error"] = 1
    start(window(target), 8)
    work.submit(7)
    target.bus.run()
    assert (work.driver.errors() == [(7, 2)]) is not damage


def skip_write_back(source: Accelerator, target: Accelerator) -> Saved:
    stop(window(source), write_back=False)
    saved = save(window(source))
    stop(window(target))
    load(window(target), saved)
    return saved


def restore(change: Callable[[Saved], None]) -> Callable[[Accelerator, Accelerator], Saved]:
    def moved(source: Accelerator, target: Accelerator) -> Saved:
        stop(window(source))
        saved = save(window(source))
        change(saved)
        stop(window(target))
        load(window(target), saved)
        return saved

    return moved


def no_restart(source: Accelerator, target: Accelerator) -> Saved:
    saved = move(window(source), window(target))
    saved.queues = 0
    return saved


def no_pause(source: Accelerator, target: Accelerator) -> Saved:
    source.vf.faults.armed["pause-ignored"] = 1
    saved = move(window(source), window(target))
    source.bus.run()
    return saved


WRONG: dict[str, Callable[[Accelerator, Accelerator], Saved]] = {
    "no write-back": skip_write_back,
    "no EQC": restore(lambda saved: setattr(saved, "eqc", [0] * 7)),
    "EQ phase": restore(lambda saved: saved.eqc.__setitem__(6, saved.eqc[6] ^ 1 << 16)),
    "EQ tail": restore(lambda saved: saved.eqc.__setitem__(0, saved.eqc[0] ^ 1 << 16)),
    "EQ base": restore(lambda saved: saved.eqc.__setitem__(1, saved.eqc[1] + 0x8000)),
    "EQ mask": restore(lambda saved: saved.plain.__setitem__(0x0C, 1)),
    "SQC table": restore(lambda saved: setattr(saved, "sqc_table", saved.cqc_table)),
    "CQC table": restore(lambda saved: setattr(saved, "cqc_table", saved.sqc_table + 32)),
    "no restart": no_restart,
    "no pause": no_pause,
}


def finish_exactly(work: Load, source: Accelerator, target: Accelerator) -> None:
    """All come, told by events at the target, and the two devices together have done each of them once."""
    for _ in range(4):  # what the source still told; a wrong EQ may tell for ever
        work.handle()
    work.finish()
    target.bus.run()
    assert source.vf.state()["completed"] + target.vf.state()["completed"] == work.completed


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_move_shows(how: str) -> None:
    source, target = pair(queues=2, entry_seconds=0.01)
    work = Load(source, queues=2, depth=8)
    for _ in range(3):
        work.submit(0, 1)
        source.bus.run()
        assert work.handle()
    work.submit(0, 4)
    work.submit(1, 4)
    source.bus.step(0.025)
    work.handle()
    saved = WRONG[how](source, target)
    before = work.completed
    work.move(target)
    start(window(target), saved.queues)
    with pytest.raises((DeviceError, AssertionError)):
        finish_exactly(work, source, target)
    assert before < 11


def test_registers_written_under_work_are_counted() -> None:
    device = Accelerator()
    work = Load(device, queues=1)
    work.submit(0)
    work.finish()
    device.write(0x8000, device.read(0x8000))
    assert counted(device.vf) == {"shadow_running": 1}


def test_a_function_without_driver_is_paused_moved_and_used() -> None:
    """No register travels then; a driver that loads at the target begins new queues, which are not paused."""
    source, target = pair()
    stop(window(source))
    assert source.read(0x60) == 1
    stop(window(target))
    work = Load(target, queues=2)
    work.fill()
    work.finish()
    assert work.completed == 14
    assert counted(target.vf) == {}


def test_a_reset_ends_the_pause() -> None:
    device = Accelerator()
    stop(window(device))
    device.vf.reset()
    work = Load(device, queues=1)
    work.submit(0)
    work.finish()


def test_other_windows_and_closed_ones() -> None:
    device = Accelerator(revision=0x50, pf_ctrl=True, vfs=2)
    second = device.functions["vf1"]
    device.pf_write(0x180000 + 2 * 0x2000 + 0x34, 2)
    assert second.read(2, 0x34, 4) == 2
    assert device.pf_read(0x180000 + 2 * 0x2000 + 0x60) == 1
    assert device.pf_read(0x180000 + 3 * 0x2000) == 0
    assert device.pf_read(0x180000) == 0
    assert counted(device.pf) == {"no_register": 2}
    device.pf_write(0x100198, 0)
    assert device.pf_read(0x180000 + 0x2000 + 0x60) == 0
    device.pf_write(0x180000 + 0x2000 + 0x60, 0)
    device.pf_write(0x180000 + 0x4000, 2 << 12, 8)
    assert counted(device.pf) == {"no_register": 2, "window_off": 3}
    assert device.read(0x8000) == 0
    assert counted(device.vf) == {}
