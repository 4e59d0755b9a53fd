"""Every hook and every method of the contract is documented, is called by the server, and is tried here."""

import inspect

import pytest

from tests.deadline import SECONDS
from tests.documents import TREE, table
from tests.kit.conftest import NAME
from tests.plugins_synthetic.device import MAILBOX, REG_CHANGE, REG_MAGIC, Shape, SyntheticDevice
from tools import kit_reference
from vfu_server import hookspecs
from vfu_server.companion import Companions
from vfu_server.device import Device, ModelCommand, Section, StateIdentity
from vfu_server.dma_memory import DmaMemory
from vfu_server.host_device import HostDevice
from vfu_server.model import Bus, Model
from vfu_server.plugins import Plugins
from vfu_server.testing import ModelProcess, migrate
from vfu_server.testing.failing import METHODS
from vfu_server.testing.fake_host import FakeHost
from vfu_server.testing.serving import Loop, Served
from vfu_server.uapi import MigState

CONTRACT = "docs/plugins/contract.md"
DECLARED = {"host", "lock"}


def members(kind: type) -> set[str]:
    own = {name for name in vars(kind) if not name.startswith("_")}
    return own - DECLARED


def hooks() -> set[str]:
    return {name for name in vars(hookspecs) if name.startswith("vfu_server_")}


def test_every_hook_and_method_has_its_row():
    rows = {row[0].strip("`"): row[1:] for row in table(CONTRACT, "name")}
    assert set(rows) == hooks() | members(Device)
    assert {name: cells for name, cells in rows.items() if len(cells) != 6 or not all(cells)} == {}


@pytest.mark.parametrize("kind", [Device, HostDevice, Companions, DmaMemory, Bus, Model])
def test_every_method_says_what_it_is_for(kind):
    silent = [
        name
        for name, member in vars(kind).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property))
        and not inspect.getdoc(member)
    ]
    assert silent == []


def test_the_reference_is_current():
    shown = kit_reference.PAGE.read_text(encoding="utf-8")
    assert shown == kit_reference.page(), "python -m tools.kit_reference --write"


def test_the_reference_has_every_module_that_plugins_may_import():
    from tests.test_layers import KIT, ROWS

    internal = {"registers", "stream", "crc32c", "trace_format"}  # of the kit's row, and no plugin's business
    assert set(kit_reference.MODULES) - {"model_registers"} == set(ROWS[KIT]) - internal | {"errors"}
    for name in kit_reference.MODULES:
        assert (TREE / "vfu_server" / f"{name}.py").is_file()


def test_the_server_calls_every_method(tmp_path):
    """A migration with all that there is, an access of each kind, a reset."""
    command = ModelCommand("plugins.generic_dmaq.models", "", ("edu",))
    shape = Shape(4 * 4096, 4096, p2p=True, pre_copy=True)

    def probe(host, options):
        return SyntheticDevice(host, shape)

    with (
        ModelProcess(command) as one,
        ModelProcess(command) as two,
        Loop() as loop,
        Served(loop, probe, one.path, name="source") as source,
        Served(loop, probe, two.path, name="destination") as destination,
    ):
        here, there = source.connect(timeout=SECONDS), destination.connect(timeout=SECONDS)
        assert here.read(0, REG_MAGIC, 4)
        here.write(0, REG_CHANGE, 4, 1)
        here.mig_data_size()
        here.set_mig_state(MigState.STOP)
        here.write(0, MAILBOX, 4, 7)
        here.set_mig_state(MigState.RUNNING)
        migrate(here, there, pre_copy=True)
        there.reset()
        source.session.statistics()
        for served in (source, destination):
            served.close()
            assert served.inner.broken == []
        called = {call.method for served in (source, destination) for call in served.device.calls}
    declared = {"policy", "capabilities", "statistics", "region_sizes", "dirty_log"}  # else it would not be served
    blocks = {"trap_read_block", "trap_write_block"}  # counted as trap_read and trap_write
    assert called == METHODS
    assert (METHODS - {"send"}) | declared | blocks == members(Device)


def test_every_hook_is_asked(importable):
    plugins = Plugins()
    plugin = plugins.load(NAME)
    from written_sum.registers import BLOCK

    asked = {
        "vfu_server_probe": lambda: plugins.probe(NAME, FakeHost({0: BLOCK}), {}),
        "vfu_server_companions": lambda: plugins.companions(NAME, "/run/x", {}),
        "vfu_server_models": lambda: plugins.models(NAME),
        "vfu_server_describe": lambda: plugins.describe(plugin, {}),
        "vfu_server_decode": lambda: plugins.decode(plugin, StateIdentity("x", 1), Section("x", 1, b"")),
    }
    assert set(asked) == hooks()
    seen = []
    plugins._pluggy.add_hookcall_monitoring(lambda name, impls, arguments: seen.append(name), lambda *rest: None)
    for name, ask in asked.items():
        ask()
        assert seen.pop() == name
