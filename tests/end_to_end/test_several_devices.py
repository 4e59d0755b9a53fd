"""Several devices in one server: started each way, and none of them waits for what another one or its client does."""

import socket
import statistics
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from tests.end_to_end.ioat_driver import IoatDriver
from tests.end_to_end.served import Process, negotiated
from tests.end_to_end.streams import parts_of
from tests.model_process import ModelProcess
from vfu_server import uapi
from vfu_server.device import Section
from vfu_server.libvfio_user.native import crc32c
from vfu_server.stream import Origin, StreamWriter
from vfu_server.testing import EduDriver, Guest, save
from vfu_server.testing.edu import BUFFER
from vfu_server.uapi import Command, Feature, HeaderFlag, MigState, RegionIndex


@contextmanager
def two_models(folder, *, scale):
    """An edu of `scale` and an I/OAT, in one server; their sockets' paths."""
    with ExitStack() as stack:
        models = []
        for name, time_scale in (("edu", scale), ("ioat", 1.0)):
            (folder / name).mkdir()
            models.append(stack.enter_context(ModelProcess(folder / name, name, time_scale=time_scale)))
        paths = [str(folder / f"{name}.sock") for name in ("one", "two")]
        config = folder / "server.toml"
        config.write_text(
            '[defaults]\nplugin = "generic_dmaq"\n'
            + "".join(
                f'[[device]]\nname = "{name}"\ndevice-socket = "{model.path}"\nsocket-path = "{path}"\n'
                for name, model, path in zip(("one", "two"), models, paths, strict=True)
            )
        )
        server = stack.enter_context(Process("--config", config, devices=2))
        yield server, *paths


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """(server, path of an edu whose transfers take 0.5 s, path of an I/OAT)."""
    with two_models(tmp_path_factory.mktemp("d"), scale=5.0) as found:
        yield found
        assert found[0].end()[0] == 0
        assert "Traceback" not in found[0].log


@contextmanager
def at_rest(path):
    """A guest of the slow edu without the machine reset of its start, which would take seconds."""
    with Guest.connect(path, timeout=10.0) as guest:
        guest.plug_in()
        guest.firmware()
        yield guest


def change_states(client):
    """Through all states and back to work, twice; the longest change in seconds."""
    worst = 0.0
    for _ in range(2):
        for state in (MigState.STOP, MigState.STOP_COPY, MigState.RUNNING):
            begun = time.monotonic()
            client.set_mig_state(state)
            if state == MigState.STOP_COPY:
                assert b"".join(save(client)).startswith(b"VFUSTATE")
            worst = max(worst, time.monotonic() - begun)
    return worst


def set_up(guest):
    guest.enable_msix(1)
    driver = IoatDriver(guest)
    driver.set_up()
    return driver


def begin_state(client, state):
    return client.send_message(
        Command.DEVICE_FEATURE,
        uapi.DEVICE_FEATURE.pack(16, Feature.MIG_DEVICE_STATE | uapi.FEATURE_SET)
        + uapi.FEATURE_STATE.pack(state, uapi.NO_DATA_FD),
    )


def test_a_device_that_is_being_stopped_delays_no_other(busy):
    _, slow_path, path = busy
    with at_rest(slow_path) as slow, Guest.connect(path) as guest:
        driver = set_up(guest.start())
        EduDriver(slow).begin_dma(0x1000, BUFFER, 64, 0)
        stop = begin_state(slow.client, MigState.STOP)
        slow.client.get_info()
        change_states(guest.client)
        driver.copy([(0x100000, 0x200000, 4096)])
        assert not slow.client.has_reply(stop), "the other one was still being stopped"
        assert slow.client.wait_reply(stop).errno == 0
        slow.client.set_mig_state(MigState.RUNNING)


def test_a_device_that_is_being_saved_delays_no_other(busy):
    _, slow_path, path = busy
    with at_rest(slow_path) as slow, Guest.connect(path) as guest:
        driver = set_up(guest.start())
        slow.client.set_mig_state(MigState.STOP_COPY)
        change_states(guest.client)
        driver.copy([(0x100000, 0x200000, 4096)])
        early = slow.client.mig_data_read(1 << 20)
        assert b"memory" not in early, "the other one was still being saved"
        assert b"memory" in b"".join(save(slow.client))


def test_a_flood_of_empty_records_delays_no_other(busy):
    """Some hundred milliseconds of work for each message, as fast as the client can send them."""
    _, path, flooded = busy
    with negotiated(flooded) as hostile, at_rest(path) as guest:
        hostile.set_mig_state(MigState.STOP_COPY)
        writer = StreamWriter(parts_of(b"".join(save(hostile))).header, crc32c)
        hostile.set_mig_state(MigState.RESUMING)
        flood = bytearray(writer.begin())
        nothing = Section("nothing", 1, b"", optional=True)
        while len(flood) < 4 << 20:
            flood += b"".join(bytes(part) for part in writer.section(nothing, Origin.SERVER))
        sent = time.monotonic()
        for at in range(0, len(flood), 1 << 20):
            part = bytes(flood[at : at + (1 << 20)])
            hostile.send_message(Command.MIG_DATA_WRITE, uapi.MIG_DATA.pack(8 + len(part), len(part)) + part)
        done = begin_state(hostile, MigState.STOP)
        turns = []
        while not hostile.has_reply(done):
            begun = time.monotonic()
            guest.client.set_mig_state(MigState.STOP)
            guest.client.set_mig_state(MigState.RUNNING)
            turns.append(time.monotonic() - begun)
            hostile.serve(0)
        taken = time.monotonic() - sent
        assert len(turns) > 2, turns
        assert statistics.median(turns) < taken / 4, f"{turns} of {taken}"


def test_a_flood_of_mistakes_delays_no_other(busy):
    server, flooded, path = busy
    mistake = uapi.HEADER.pack(1, 999, uapi.HEADER.size, HeaderFlag.NO_REPLY, 0) * 8192
    with negotiated(flooded) as hostile, Guest.connect(path) as guest:
        guest.start()
        hostile.sock.setblocking(True)
        over = threading.Event()

        def flood():
            while not over.is_set():
                hostile.sock.sendall(mistake)

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            assert change_states(guest.client) < 1.0
        finally:
            over.set()
            thread.join()
    assert server.process.poll() is None


def test_a_client_that_never_reads_its_replies_disturbs_no_other(busy):
    _, slow_path, path = busy
    with negotiated(slow_path) as deaf, Guest.connect(path) as guest:
        driver = set_up(guest.start())
        read = uapi.HEADER.pack(7, Command.REGION_READ, 32, 0, 0) + uapi.REGION_ACCESS.pack(0, RegionIndex.CONFIG, 256)
        state = uapi.HEADER.pack(8, Command.DEVICE_FEATURE, 24, 0, 0) + uapi.DEVICE_FEATURE.pack(
            16, Feature.MIG_DEVICE_STATE | uapi.FEATURE_GET
        )
        clogged(deaf.sock, (read * 50 + state) * 50)
        assert change_states(guest.client) < 1.0
        driver.copy([(0x100000, 0x200000, 4096)])
    with negotiated(slow_path) as client:
        assert client.read(RegionIndex.CONFIG, 0, 4) == 0x11E81234


def clogged(sock, data):
    """Send until the server takes no more, since nobody takes its replies."""
    sock.settimeout(0.3)
    try:
        while True:
            sock.sendall(data)
    except TimeoutError:
        return
    finally:
        sock.settimeout(None)


def test_devices_by_repeated_options(folder):
    """Each `--model` is a device of its own, at its own place."""
    options = ("--plugin", "generic_dmaq", "--model", "edu", "--model", "ioat", "--socket-path", folder / "%n.sock")
    with Process(*options, devices=2) as server, ExitStack() as stack:
        edu, ioat = (stack.enter_context(Guest.connect(str(folder / f"{name}.sock"))) for name in ("edu", "ioat"))
        assert EduDriver(edu.start()).factorial(5) == 120
        set_up(ioat.start()).copy([(0x100000, 0x200000, 100)])
        assert server.threads() > 4
        code, seconds = server.end()
        assert (code, seconds < 4.5) == (0, True)
        for guest in (edu, ioat):
            assert guest.client.sock.recv(1, socket.MSG_DONTWAIT) == b"", "an end of file, not a reset"
