"""`main_functions`: several functions in one process, each for a client of its own, under one lock."""

import errno
import os
import select
import signal
import socket
import threading

import pytest

from tests.companions.functions import ADDRESS, DOORBELL, SAVE, STATUS, VF_DMA
from tests.deadline import SECONDS
from tests.model_process import ModelProcess, run_model
from vfu_server.model_server import main_functions
from vfu_server.testing import Client, Guest, GuestMemory
from vfu_server.uapi import PCI_COMMAND, RegionIndex

MODULE = "tests.companions.functions"
MB = 1 << 20


@pytest.fixture
def model(tmp_path):
    with ModelProcess(tmp_path, module=MODULE) as model:
        yield model


def client_of(path) -> Client:
    client = Client.connect(str(path), timeout=SECONDS)
    client.negotiate()
    client.write(RegionIndex.CONFIG, PCI_COMMAND, 2, 6)
    return client


def test_each_is_a_device_of_its_own(model, tmp_path):
    assert model.ready == f"ready {model.path}\n"
    assert sorted(os.listdir(tmp_path)) == [
        *("control.sock", "control.sock.pf", "control.sock.vf2", "model.sock", "model.sock.pf", "model.sock.vf2")
    ]
    with client_of(model.path) as vf, client_of(f"{model.path}.pf") as pf, client_of(f"{model.path}.vf2") as second:
        ids = [client.read(RegionIndex.CONFIG, 2, 2) for client in (vf, pf, second)]
        assert ids == [0x10F1, 0x10F0, 0x10F1]
        vf.write(0, 0, 4, 7)
        assert (vf.read(0, 0, 4), second.read(0, 0, 4)) == (7, 0)
        assert model.accesses(0) == 2  # the first function's control socket knows of the first function
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(f"{tmp_path}/control.sock.vf2")
            control.sendall(b'{"op": "accesses"}\n')
            assert b'"total": 3' in control.recv(1 << 16)  # COMMAND, the id, the register
    status, said = model.terminate()
    assert (status, said) == (0, "")
    assert os.listdir(tmp_path) == []


def test_a_pf_reaches_its_vfs_guest(model):
    with GuestMemory.of(MB) as memory, Guest.connect(model.path, memory, timeout=SECONDS) as guest:
        guest.start()
        interrupts = guest.enable_msi(1)
        memory.write(0x1000, b"data")
        with client_of(f"{model.path}.pf") as pf:
            pf.write(0, VF_DMA, 8, 0x1000)
            interrupts.wait()
        assert memory.read(0x1000, 8) == b"datadata"
        assert guest.read(0, 0, 4) == int.from_bytes(b"data", "little")


def test_accesses_go_on_while_a_dma_waits_for_another_client(model):
    """The PF's client has its memory served by messages, and answers only after the VF's client was served."""
    answers = []

    class Memory:
        def dma_read(self, iova, length):
            return bytes(length)

        def dma_write(self, iova, data):
            vf.write(0, 0, 4, 0x55)
            answers.append((vf.read(0, 0, 4), data[:4]))

    with client_of(model.path) as vf, Client.connect(f"{model.path}.pf", timeout=SECONDS, memory=Memory()) as pf:
        pf.negotiate()
        pf.write(RegionIndex.CONFIG, PCI_COMMAND, 2, 6)
        pf.dma_map(0, MB)
        pf.write(0, ADDRESS, 8, 0x2000)
        pf.write(0, DOORBELL, 4, SAVE)
        while pf.read(0, STATUS, 4):
            pf.serve(0.001)
    assert answers == [(0x55, (1).to_bytes(4, "little"))]


def test_many_clients_at_once(model):
    """All functions, their timers, DMA by messages and shared, in threads."""
    failures: list[BaseException] = []
    ready, done = threading.Barrier(3), threading.Event()

    def commands():
        with GuestMemory() as memory:
            memory.add(0, MB, shared=False)
            with Client.connect(f"{model.path}.pf", timeout=SECONDS, memory=memory) as pf:
                pf.negotiate()
                memory.map_into(pf)
                pf.write(RegionIndex.CONFIG, PCI_COMMAND, 2, 6)
                pf.write(0, ADDRESS, 8, 0x2000)
                ready.wait(SECONDS / 4)
                for number in range(1, 101):
                    pf.write(0, VF_DMA, 8, 0x1000)
                    pf.write(0, DOORBELL, 4, SAVE)
                    while pf.read(0, STATUS, 4):
                        pf.serve(0.001)
                    assert memory.read(0x2000, 4) == number.to_bytes(4, "little")

    def writes(path):
        with GuestMemory() as memory:
            memory.add(0, MB, shared=path == model.path)
            with Client.connect(path, timeout=SECONDS, memory=memory) as vf:
                vf.negotiate()
                memory.map_into(vf)
                vf.write(RegionIndex.CONFIG, PCI_COMMAND, 2, 6)
                ready.wait(SECONDS / 4)
                while not done.is_set():
                    vf.write(0, 0, 4, 1)
                    vf.read(0, 0, 4)

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)
        finally:
            done.set()

    threads = [threading.Thread(target=guarded, args=(commands,), daemon=True)]
    for path in (model.path, f"{model.path}.vf2"):
        threads.append(threading.Thread(target=guarded, args=(writes, path), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS / 2)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def test_it_ends_while_one_functions_dma_waits_in_anothers_memory(tmp_path):
    """The PF's callback waits for the VF's client, who never answers: nothing is freed under it."""
    with ModelProcess(tmp_path, module=MODULE) as model:
        with client_of(model.path) as vf, client_of(f"{model.path}.pf") as pf:
            vf.dma_map(0, MB)
            pf.write(0, VF_DMA, 8, 0x1000)
            assert select.select([vf.sock], [], [], SECONDS)[0]  # the DMA_READ is here, and stays unanswered
            model.process.send_signal(signal.SIGTERM)
            _, said = model.process.communicate(timeout=SECONDS)
        assert model.process.returncode == 0, said
        assert "BusError" in said


def test_usage(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        done = run_model("--fd", str(listener.fileno()), module=MODULE)
        assert (done.returncode, done.stderr) == (
            1,
            "--fd is one socket, and there are 3 functions: use --socket-path\n",
        )
    (tmp_path / "taken.pf").write_text("a file")
    done = run_model("--socket-path", str(tmp_path / "taken"), module=MODULE)
    assert (done.returncode, done.stderr) == (1, f"{tmp_path}/taken.pf: {os.strerror(errno.EADDRINUSE)}\n")
    assert sorted(os.listdir(tmp_path)) == ["s", "taken.pf"]


@pytest.mark.parametrize(("names", "said"), [((), "functions called nothing"), (("a", "b/c"), "'b/c'")])
def test_names_that_cannot_have_sockets(tmp_path, capsys, names, said):
    from tests.companions.functions import Vf

    assert main_functions({name: Vf() for name in names}, ["--socket-path", str(tmp_path / "s")]) == 1
    assert said in capsys.readouterr().err
