"""Golden streams into real servers before the models: the guest that was saved goes on."""

import random

from tests.end_to_end.ioat_driver import IoatDriver
from tests.end_to_end.served import Served
from tests.golden.registry import golden
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
