"""`self-test=yes` reads every register that can be read without an effect, tells what it says, and writes nothing."""

import logging

from plugins.hns.registers import CONTEXT_WORDS, FUNCTION, QM_REGION
from tests.model_process import ModelProcess
from tests.plugins.hns.faults import Side
from tests.plugins.hns.served import MODULE
from vfu_server.regmap import READABLE


def opened(folder, **options) -> list[str]:
    """All accesses of a device that is opened, to its PF's registers, too."""
    folder.mkdir()
    with ModelProcess(folder, "zip", module=MODULE, time_scale=1.0) as model:
        side = Side(str(model.path), **options)
        side.close()
        return side.orders.calls


def test_it_writes_nothing(tmp_path):
    without, with_test = opened(tmp_path / "without"), opened(tmp_path / "with", self_test="yes")
    assert [call for call in with_test if not call.startswith("read")] == [
        call for call in without if not call.startswith("read")
    ]
    assert len(with_test) > len(without)


def test_every_register_is_read_and_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        with_test = opened(tmp_path / "with", self_test="yes")
    assert "self-test of a zip V3, revision 0x30; nothing is written" in caplog.text
    for register in FUNCTION:
        read = f"read({QM_REGION:#x}, {register.offset:#x}, {register.width:#x})"
        assert (read in with_test) == (register.access in READABLE) or register.name.startswith("mailbox"), (
            register.name
        )
        assert (f": {register.offset:#06x} {register.name} " in caplog.text) == (register.access in READABLE)
    for word in [f"{ring}{n}" for ring in ("eqc", "aeqc") for n in range(CONTEXT_WORDS)]:
        assert f" {word} 0x" in caplog.text
    for status in ("qm_error_status", "core_status", "queue_isolation"):
        assert f": {status} 0x" in caplog.text
