"""What goes away under a server: memory that a client cuts short, a model that dies or hangs, with its client there."""

import errno
import os
import signal

import pytest

from tests.end_to_end.served import Process, Served, negotiated, until
from tests.model_process import ModelProcess
from vfu_server import uapi
from vfu_server.testing import EduDriver, Guest, GuestMemory, ReplyError
from vfu_server.testing.edu import BUFFER, DMA_FROM_DEVICE, REG_DMA_COMMAND, REG_ID
from vfu_server.uapi import Command, IrqIndex, MigState, RegionIndex


def refused_with(code, call, *arguments, **named):
    with pytest.raises(ReplyError) as caught:
        call(*arguments, **named)
    assert caught.value.errno == code


def all_ones(driver):
    """A moment after the loss; until then the device's door answers ENODEV."""
    try:
        return driver.read32(REG_ID) == 0xFFFFFFFF
    except ReplyError as error:
        if error.errno != errno.ENODEV:
            raise
        return False


# memory


@pytest.mark.parametrize("direction", [0, DMA_FROM_DEVICE])
def test_memory_that_is_cut_short_while_dma_runs_kills_nobody(folder, direction):
    """A plain load or store would raise SIGBUS, in the model or in the server."""
    with Served(folder, "edu", time_scale=0.2) as server:
        with GuestMemory.of(1 << 20) as memory, server.connect(memory) as guest:
            driver = EduDriver(guest.start())
            addresses = (BUFFER, 0x8000) if direction else (0x8000, BUFFER)
            driver.begin_dma(*addresses, 4096, direction)
            os.ftruncate(memory.fd, 0)
            assert driver.read32(REG_DMA_COMMAND) & 1, "it was cut while the transfer ran"
            driver.finish_dma()
            assert driver.factorial(5) == 120
            guest.client.set_mig_state(MigState.STOP)
            guest.client.set_mig_state(MigState.RUNNING)
            os.ftruncate(memory.fd, 1 << 20)
            memory.write(0x8000, b"back again")
            driver.copy_to_device(0x8000, 10)
            driver.copy_from_device(0x9000, 10)
            assert memory.read(0x9000, 10) == b"back again"
            os.ftruncate(memory.fd, 0)
            guest.client.dma_unmap(0, 1 << 20)
        with server.connect() as guest:
            assert EduDriver(guest.start()).factorial(4) == 24
        assert server.model.process.poll() is None
        assert server.end()[0] == 0


def test_a_save_into_memory_that_is_cut_short_survives(edu):
    """The scratch memory is the server's own: the client's cut changes nothing."""
    driver = EduDriver(edu)
    edu.memory.write(0x1000, b"in the buffer")
    driver.copy_to_device(0x1000, 13)
    size = os.fstat(edu.memory.fd).st_size
    os.ftruncate(edu.memory.fd, 0)
    edu.client.set_mig_state(MigState.STOP_COPY)
    data = b""
    while part := edu.client.mig_data_read(1 << 20):
        data += part
    assert b"in the buffer" in data
    os.ftruncate(edu.memory.fd, size)


# a model that dies


def test_a_model_that_dies_leaves_its_client_a_dead_device_until_it_goes(folder):
    with Served(folder, "edu", time_scale=0.01) as server:
        with server.connect() as guest:
            driver = EduDriver(guest.start())
            driver.use_msi()
            server.model.process.kill()
            server.wait_log("the device is gone")
            client = guest.client
            assert server.process.poll() is None
            until(lambda: client.mig_state() == MigState.ERROR, "the state does not tell")
            until(lambda: all_ones(driver), "a dead device does not read as a function that was pulled out")
            driver.write32(REG_ID, 1)
            refused_with(errno.ENODEV, client.read, RegionIndex.CONFIG, 0, 4)
            refused_with(errno.ENODEV, client.write, RegionIndex.CONFIG, 4, 2, 6)
            assert client.get_info().num_regions == 9
            assert client.get_region_info(0).size == 1 << 20
            refused_with(errno.ENODEV, guest.enable_intx)
            refused_with(errno.ENODEV, client.reset)
            refused_with(errno.EINVAL, client.set_mig_state, MigState.STOP)
            refused_with(errno.EINVAL, client.mig_data_read, 100)
            client.dma_map(0x4000_0000, 0x1000, fd=guest.memory.fd)
            client.dma_unmap(0x4000_0000, 0x1000)
            guest.memory.unmap_from(client)
            assert client.mig_state() == MigState.ERROR
            refused_with(errno.EBUSY, negotiated, server.path)
            assert server.process.poll() is None
        assert server.wait() == 6
        assert "Traceback" not in server.log
    assert not os.path.exists(server.path)


def test_a_model_that_dies_while_its_state_is_read(folder):
    """Its buffer's transfer takes 2 s: the client waits for what never comes."""
    with Served(folder, "edu", time_scale=20.0) as server:
        with server.connect() as guest:
            guest.plug_in()
            client = guest.client
            client.set_mig_state(MigState.STOP_COPY)
            data = client.mig_data_read(12)
            config = 48 + 256 + 4
            while len(data) < int.from_bytes(data[10:12], "little") + config:
                data += client.mig_data_read(1 << 20)
            waiting = client.send_message(Command.MIG_DATA_READ, uapi.MIG_DATA.pack(8 + 4096, 4096))
            client.get_info()
            server.model.process.kill()
            assert client.wait_reply(waiting).errno == errno.ENODEV
            until(lambda: client.mig_state() == MigState.ERROR, "the state does not tell")
        assert server.wait() == 6
        assert "Traceback" not in server.log


def test_a_model_that_dies_while_its_state_is_written(folder):
    with Served(folder, "edu", time_scale=20.0) as server:
        with server.connect() as guest:
            guest.plug_in()
            guest.client.set_mig_state(MigState.RESUMING)
            guest.client.mig_data_write(b"VFUSTATE")
            server.model.process.kill()
            until(lambda: guest.client.mig_state() == MigState.ERROR, "the state does not tell")
            refused_with(errno.EINVAL, guest.client.set_mig_state, MigState.RUNNING)
        assert server.wait() == 6
        assert "Traceback" not in server.log


def test_a_model_that_dies_while_the_device_is_brought_to_rest(folder):
    with Served(folder, "edu", time_scale=10.0) as server:
        with server.connect() as guest:
            guest.plug_in()
            guest.firmware()
            EduDriver(guest).begin_dma(0x1000, BUFFER, 64, 0)
            stop = guest.client.send_message(
                Command.DEVICE_FEATURE,
                uapi.DEVICE_FEATURE.pack(16, uapi.Feature.MIG_DEVICE_STATE | uapi.FEATURE_SET)
                + uapi.FEATURE_STATE.pack(MigState.STOP, uapi.NO_DATA_FD),
            )
            guest.client.get_info()
            server.model.process.kill()
            assert guest.client.wait_reply(stop).errno == errno.ENODEV
            until(lambda: guest.client.mig_state() == MigState.ERROR, "the state does not tell")
        assert server.wait() == 6
        assert "Traceback" not in server.log


def test_a_model_that_dies_without_a_client_ends_the_server(folder):
    with Served(folder, "edu", time_scale=0.01) as server:
        server.model.process.kill()
        assert server.wait() == 6
    assert not os.path.exists(server.path)


def test_of_two_devices_only_the_lost_one_ends_and_its_client_is_served_to_its_end(folder):
    names = ("one", "two")
    for name in names:
        (folder / name).mkdir()
    with ModelProcess(folder / "one", "edu") as one, ModelProcess(folder / "two", "edu") as two:
        paths = [str(folder / f"{name}.sock") for name in names]
        config = folder / "server.toml"
        config.write_text(
            "".join(
                f'[[device]]\nname = "{name}"\nplugin = "generic_dmaq"\ndevice-socket = "{model.path}"\n'
                f'socket-path = "{path}"\n'
                for name, model, path in zip(names, (one, two), paths, strict=True)
            )
        )
        with Process("--config", config, devices=2) as server:
            with Guest.connect(paths[0]) as first, Guest.connect(paths[1]) as second:
                lost, other = EduDriver(first.start()), EduDriver(second.start())
                one.process.kill()
                until(lambda: all_ones(lost), "a dead device does not read as all ones")
                assert other.factorial(5) == 120
                first.client.dma_unmap_all()
                first.close()
                server.wait_log("the device is no longer served")
                assert not os.path.exists(paths[0])
                second.memory.write(0x1000, b"untouched")
                other.copy_to_device(0x1000, 9)
                second.client.set_mig_state(MigState.STOP)
                second.client.set_mig_state(MigState.RUNNING)
                other.copy_from_device(0x2000, 9)
                assert second.memory.read(0x2000, 9) == b"untouched"
            with Guest.connect(paths[1]) as third:
                assert EduDriver(third.start()).factorial(6) == 720
            server.forget()
            assert server.end()[0] == 0


# a model that hangs


def test_a_model_that_hangs_is_given_up_before_its_client_gives_us_up(folder):
    with Served(folder, "edu", time_scale=0.01) as server:
        with server.connect(timeout=5.0) as guest:
            driver = EduDriver(guest.start())
            for n in range(20):
                guest.client.dma_map(0x4000_0000 + 0x2000 * n, 0x1000, fd=guest.memory.fd)
            os.kill(server.model.process.pid, signal.SIGSTOP)
            try:
                guest.client.dma_unmap_all()  # 21 maps, of which none is answered
                until(lambda: all_ones(driver), "a dead device does not read as all ones")
                refused_with(errno.ENODEV, guest.client.set_irqs, IrqIndex.INTX, uapi.IRQ_SET_DATA_NONE | 0x20)
                assert server.process.poll() is None
            finally:
                os.kill(server.model.process.pid, signal.SIGCONT)
        assert server.wait() == 6
        assert "Traceback" not in server.log
