"""The model as a process behind sockets: load that looks at every result, DMA by messages, the PF's socket, a move."""

import subprocess
import sys

import pytest

from plugins.hns.models.guest_driver import DeviceError
from plugins.hns.models.traffic import GuestPort, Traffic
from tests.model_process import TREE, ModelProcess, run_model
from tests.plugins.hns_model.mover import Window, load, save, start, stop
from vfu_server.errors import DeadlineError
from vfu_server.testing import Client, Guest, GuestMemory

MODULE = "plugins.hns.models"
MB = 1 << 20


def model(tmp_path, *arguments: str, kind: str = "zip") -> ModelProcess:
    tmp_path.mkdir(exist_ok=True)
    return ModelProcess(tmp_path, kind, *arguments, module=MODULE)


def clean(process: ModelProcess) -> dict[str, int]:
    return {name: value for name, value in process.registers().items() if name.startswith("violation")}


@pytest.mark.parametrize("kind", ["zip", "sec", "hpre"])
def test_load_over_a_socket(tmp_path, kind: str) -> None:
    with model(tmp_path, kind=kind) as process, Guest.connect(process.path) as guest:
        guest.start()
        traffic = Traffic(guest, kind, queues=3, isolation=kind == "sec", size=256)
        traffic.run_entries(200)
        count = traffic.finish()
        assert count.submitted == count.completed == process.registers()["completed"] >= 200
        traffic.driver.stop()
        assert clean(process) == {"violations": 0}


def test_memory_by_messages_and_a_mailbox_in_halves(tmp_path) -> None:
    memory = GuestMemory()
    memory.add(0, 4 * MB, shared=False)
    with model(tmp_path) as process, Guest.connect(process.path, memory) as guest:
        guest.start()
        traffic = Traffic(guest, queues=2, depth=8, halves=True)
        traffic.run_entries(20)
        traffic.finish()
        guest.client.reset()
        assert guest.client.dma_writes > 40
        assert clean(process) == {"violations": 0}
        assert process.registers()["resets"] >= 1
        assert process.registers()["vf_state"] == 1


@pytest.mark.parametrize("mode", [(), ("--revision", "0x50", "--mode", "pf-ctrl")], ids=["VF_CTRL", "PF_CTRL"])
def test_load_moves_to_another_process(tmp_path, mode: tuple[str, ...]) -> None:
    memory = GuestMemory.of(4 * MB)
    arguments = ("--queues", "4", "--entry-seconds", "0.1", *mode)
    with model(tmp_path / "a", *arguments) as one, model(tmp_path / "b", *arguments) as two:
        with (
            Guest.connect(one.path, memory) as source,
            Guest.connect(two.path, memory) as target,
            Guest.connect(f"{one.path}.pf", memory) as source_pf,
            Guest.connect(f"{two.path}.pf", memory) as target_pf,
        ):
            for guest in (source, target, source_pf, target_pf):
                guest.start()
            windows = [
                Window(GuestPort(pf), 0x182000, 0x1C00, 0x1C20) if mode else Window(GuestPort(vf))
                for vf, pf in ((source, source_pf), (target, target_pf))
            ]
            traffic = Traffic(source, queues=4, size=256)
            for _ in range(2):
                traffic.run_entries(60)
                traffic.submit()
                stop(windows[0])
                saved = save(windows[0])
                stop(windows[1])
                load(windows[1], saved)
                traffic.move(target)
                start(windows[1], saved.queues)
                windows.reverse()
                source, target = target, source
                if traffic.count().in_flight:
                    traffic.run_entries(1)
            count = traffic.finish()
            assert count.submitted == count.completed
            assert count.completed == sum(process.registers()["completed"] for process in (one, two))
        assert clean(one) == clean(two) == {"violations": 0}
    memory.close()


def test_the_pf_and_further_vfs_have_sockets(tmp_path) -> None:
    with model(tmp_path, "--vfs", "2", "--queues", "8", "--pf-queues", "32") as process:
        for name, device, word in (("", 0xA251, 32), (".vf1", 0xA251, 40), (".pf", 0xA250, 0)):
            with Guest.connect(f"{process.path}{name}") as guest:
                guest.start()
                assert guest.config.read(0, 4) == device << 16 | 0x19E5
                window = Window(GuestPort(guest))
                assert window.command(6, get=True) >> 28 & 0xFFFF == word


def test_the_pf_injects_an_error_and_gets_an_interrupt(tmp_path) -> None:
    with model(tmp_path) as process, Guest.connect(f"{process.path}.pf") as guest:
        guest.start()
        interrupts = guest.enable_msi(4)
        guest.write(2, 0x10000C, 4, 2)
        assert interrupts.wait(3, 30.0) == 1
        assert guest.read(2, 0x100008, 4) == 2


@pytest.mark.parametrize(
    ("fault", "seconds", "error"),
    [("bit-flip", 30.0, DeviceError), ("cqe-error", 30.0, DeviceError), ("lost-completion", 0.5, DeadlineError)],
)
def test_load_finds_what_goes_wrong(tmp_path, fault: str, seconds: float, error: type[Exception]) -> None:
    with model(tmp_path) as process, Guest.connect(process.path) as guest:
        guest.start()
        traffic = Traffic(guest, queues=2)
        traffic.run_entries(10)
        process.control("fault", name=fault, times=1)
        traffic.timeout = seconds
        with pytest.raises(error):
            lost(traffic)


def lost(traffic: Traffic) -> None:
    traffic.run_entries(20)
    traffic.finish()


def test_a_client_that_goes_leaves_a_device_that_was_reset(tmp_path) -> None:
    with model(tmp_path, "--entry-seconds", "1000") as process:
        with Guest.connect(process.path) as guest:
            guest.start()
            traffic = Traffic(guest, queues=1)
            traffic.submit()
        with Guest.connect(process.path) as guest:
            guest.start()
            assert guest.read(2, 0x60, 4) == 1
            assert process.registers()["at_hand"] == 0


def test_load_as_a_program(tmp_path) -> None:
    command = [sys.executable, "-m", "plugins.hns.models.traffic", "--queues", "2", "--seconds", "0.3", "--socket-path"]
    with model(tmp_path) as process:
        done = subprocess.run([*command, str(process.path)], cwd=TREE, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Count(submitted=")
        assert clean(process) == {"violations": 0}
    done = subprocess.run([*command, str(tmp_path / "no")], cwd=TREE, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("zip", "--revision", "0x31"), 1, "there is no generation 0x31"),
        (("sec", "--mode", "pf-ctrl"), 1, "pf-ctrl needs a generation later than V3"),
        (("hpre", "--vfs", "64"), 1, "1 to 63 VFs"),
        (("zip", "--queues", "2000"), 1, "1024 queues"),
        (("abc",), 2, "abc"),
        (("zip", "--queues", "x"), 2, "--queues"),
        (("zip", "--entry-seconds", "-1"), 1, "0 to 10000 seconds"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, arguments: tuple[str, ...], status: int, words: str) -> None:
    done = run_model(*arguments, "--socket-path", str(tmp_path / "s"), module=MODULE)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_client_waits_its_turn(tmp_path) -> None:
    with model(tmp_path) as process, Guest.connect(process.path) as guest:
        guest.start()
        with Client.connect(f"{process.path}.pf") as pf:
            pf.negotiate()
            assert pf.read(2, 0x100008, 4) == 0
        assert guest.read(2, 0x60, 4) == 1
