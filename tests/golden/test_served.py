"""Golden streams into real servers before the models: the guest that was saved goes on."""

import random

from plugins.hns.models.traffic import Traffic as HnsTraffic
from plugins.mlx5.models.options import LEAST_IMAGE
from plugins.mlx5.models.traffic import Traffic as Mlx5Traffic
from tests.end_to_end.ioat_driver import IoatDriver
from tests.end_to_end.served import Served
from tests.golden.registry import golden
from tests.plugins.hns.served import SECONDS
from tests.plugins.hns.served import Served as HnsServed
from tests.plugins.mlx5.test_served import GuestPort
from tests.plugins.mlx5.test_served import Served as Mlx5Served
from vfu_server.testing import EduDriver, load
from vfu_server.testing.edu import REG_DMA_SOURCE, REG_LIVENESS
from vfu_server.uapi import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, MigState


def arrive(guest, variant):
    """What a VMM does with a state that it was given."""
    (data,) = [one.data() for one in golden() if one.variant == variant]
    guest.plug_in()
    guest.machine_reset()
    guest.client.set_mig_state(MigState.RESUMING)
    load(guest.client, [data])
    guest.client.set_mig_state(MigState.RUNNING)
    guest.config.write(PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)


def test_edu_goes_on(tmp_path):
    with Served(tmp_path, "edu", time_scale=0.01) as server, server.connect() as guest:
        arrive(guest, "edu")
        driver = EduDriver(guest)
        assert driver.read32(REG_LIVENESS) == 0xC0FFEE00 ^ 0xFFFFFFFF
        assert guest.read(0, REG_DMA_SOURCE, 8) == 0x123456789A
        driver.copy_from_device(0x9000, 4096)
        assert guest.memory.read(0x9000, 4096) == random.Random(1).randbytes(4096)
        assert driver.factorial(5) == 120


def test_ioat_is_taken_and_works_for_a_driver_that_begins_anew(tmp_path):
    """The ring that it had was in its guest's memory, which no file keeps."""
    with Served(tmp_path, "ioat", "--channels", "2", time_scale=1.0) as server, server.connect() as guest:
        arrive(guest, "ioat")
        assert guest.config.read(0x3C, 1) == 10
        guest.enable_msix(2)
        driver = IoatDriver(guest)
        driver.set_up()
        driver.copy([(0x100000, 0x200000, 4096)] * 3)


def test_zip_is_taken_and_works_for_a_driver_that_begins_anew(tmp_path):
    """Its queues were in its guest's memory; the driver resets the function, as after any strange state."""
    with HnsServed(tmp_path / "m") as server, server.connect() as guest:
        arrive(guest, "zip")
        assert guest.config.read(0x3C, 1) == 11
        guest.client.reset()
        guest.config.write(PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)
        traffic = HnsTraffic(guest, "zip", queues=4, timeout=SECONDS)
        traffic.run_entries(50)
        assert traffic.finish().in_flight == 0
        assert server.model.registers()["violations"] == 0
        assert "Traceback" not in server.said()


def test_connectx_is_taken_and_works_for_a_driver_that_begins_anew(tmp_path):
    with Mlx5Served(tmp_path / "m", "--image-size", str(LEAST_IMAGE)) as served, served.guest() as guest:
        arrive(guest, "connectx")
        assert guest.config.read(0x3C, 1) == 9
        assert served.card.registers()["pair[2].enabled"] == 1
        guest.client.reset()
        guest.config.write(PCI_COMMAND, 2, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)
        guest.enable_msix(8)
        traffic = Mlx5Traffic(GuestPort(guest), pairs=(0, 2))
        traffic.start()
        traffic.run(20)
        assert served.registers["violations"] == 0
        assert "Traceback" not in served.server.said()
