"""A VF that its kernel driver migrates, and one that we migrate: the state of each loads into the other.

The kernel's driver stands in as far as its user sees it: the blob, 40 bytes of it early.
"""

import socket
from contextlib import ExitStack

import pytest
import trio

from plugins.hns.blob import MATCH_SIZE, SIZE, Match, State, decode_match, decode_state
from plugins.hns.kernel import HnsKernelDevice
from plugins.hns.probe import probe
from plugins.hns.registers import HALF, QM_REGION, VENDOR, ZIP
from tests.host.fake_function import FakeFunction
from tests.host.fake_kernel import FakeKernel
from tests.host.fake_migration import FakeMigration
from tests.host.tree import Machine
from tests.plugins.hns.served import SECONDS, arrival, at_work
from tests.trio_thread import TrioThread
from vfu_server.host.kernel import open_bdf
from vfu_server.session import Session, SessionOptions
from vfu_server.testing import Client, migrate, save
from vfu_server.uapi import (
    MIGRATION_PRE_COPY,
    MIGRATION_STOP_COPY,
    PCI_COMMAND,
    PCI_COMMAND_MEMORY,
    MigState,
    RegionIndex,
)

BDF = "0000:75:00.1"
STATE = State(
    0, 0, 0, 0, 0, 0, (0, 0x1000, 0, 0, 0, 0, 0x100FF), (0, 0x2000, 0, 0, 0, 0, 0x1003F), 0x1000, 0x2000, 0x3000, 0x4000
)
BLOB = Match(16, ZIP.vf_id, 1, 64).encode() + STATE.encode()


class HisiAcc(FakeMigration):
    """hisi_acc_vfio_pci: its data are the blob and nothing else."""

    def _arc(self, source: MigState, target: MigState) -> int:
        opened = super()._arc(source, target)
        if self.file is not None and self.file.saving:
            early = source is MigState.PRE_COPY
            if target is MigState.PRE_COPY:
                self.file.queue[:] = self.state[:MATCH_SIZE]
            else:
                self.file.queue[:] = self.state[MATCH_SIZE if early else 0 :]
            self.file.initial = MATCH_SIZE if target is MigState.PRE_COPY else 0
        return opened

    def _take(self) -> None:
        decode_state(bytes(self.file.queue))
        self.state[:] = self.file.queue


class KernelSide(TrioThread):
    """One VF under that driver, served. `config`: what its config space reads."""

    def __init__(self, root, config: bytes, blob: bytes) -> None:
        super().__init__("kernel side")
        machine = Machine(root)
        machine.function(BDF, driver="hisi_acc_vfio_pci", cdev="vfio0", ids=(VENDOR, ZIP.vf_id))
        machine.group_nodes()
        machine.cdev_nodes()
        function = FakeFunction(BDF)
        function.sizes[QM_REGION], function.flags[QM_REGION] = HALF, 7  # the kernel halves it, and would map it
        function.memory[QM_REGION] = bytearray(HALF)
        function.memory[RegionIndex.CONFIG][:] = config
        function.memory[RegionIndex.CONFIG][PCI_COMMAND] = PCI_COMMAND_MEMORY  # of a VF it is on without
        self.kernel = FakeKernel(root, function)
        self.kernel.cdevs["vfio0"] = function
        self.driver = HisiAcc(self.kernel, function, MIGRATION_STOP_COPY | MIGRATION_PRE_COPY, blob)
        self.device: HnsKernelDevice
        self.session: Session
        self.start()

    async def _serve(self) -> None:
        host = await open_bdf(BDF, kernel=self.kernel.kernel)
        device = probe(host, {})
        assert isinstance(device, HnsKernelDevice)
        self.device = device
        options = SessionOptions(mmap="all", dirty_tracking="all")
        self.session = Session(
            name=BDF, host=host, device=device, plugin_name="hns", plugin_version="1", options=options
        )
        self._send, receive = trio.open_memory_channel[int](1)
        self._serving()
        try:
            with self._scope:
                await self.session.run(receive.receive)
        finally:
            with trio.CancelScope(shield=True):
                await self.session.shutdown()
                await device.aclose()
                await host.aclose()

    def connect(self) -> Client:
        ours, theirs = socket.socketpair()
        self.on_trio(self._send.send_nowait, theirs.detach())
        client = Client(ours, timeout=SECONDS)
        client.negotiate()
        return client

    def close(self) -> None:
        super().close()
        self.kernel.close()


@pytest.fixture
def kernel_side(pair, tmp_path):
    """The same device, as far as ids and config space go, with that driver."""
    with pair[0].connect() as guest:
        guest.plug_in()
        guest.machine_reset()
        config = guest.client.read_block(RegionIndex.CONFIG, 0, 0x1000)
    side = KernelSide(tmp_path / "root", config, BLOB)
    yield side
    side.close()


def test_our_state_goes_to_the_kernels_driver(pair, kernel_side):
    with ExitStack() as stack:
        here, traffic = at_work(stack, pair[0])
        traffic.run_entries(20)
        traffic.finish()
        client = stack.enter_context(kernel_side.connect())
        migrate(here.client, client)
        blob = bytes(kernel_side.driver.state)
        assert len(blob) == SIZE
        assert decode_match(blob) == decode_match(BLOB)
        assert decode_state(blob).sqc == traffic.driver.layout.sqc_table
        assert kernel_side.driver.mig_state is MigState.RUNNING


@pytest.mark.parametrize("pre_copy", [True, False])
def test_the_kernels_state_comes_to_us(pair, kernel_side, pre_copy):
    with ExitStack() as stack:
        client = stack.enter_context(kernel_side.connect())
        there = stack.enter_context(arrival(pair[1]))
        migrate(client, there.client, pre_copy=pre_copy)
        registers = pair[1].model.control("state")["registers"]
        assert registers["vf_state"] == 0
        there.client.set_mig_state(MigState.STOP_COPY)
        assert BLOB[MATCH_SIZE:64] in b"".join(save(there.client))


def test_the_kernels_function_is_not_mapped(kernel_side):
    assert kernel_side.session.mapped == {}
    with kernel_side.connect() as client:
        info = client.get_region_info(QM_REGION)
        assert (info.size, info.fd) == (HALF, -1)
