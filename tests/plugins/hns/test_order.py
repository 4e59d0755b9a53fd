"""The order of a stop, a save and a start, as the function's registers see it: pause, look at errors, write back.

Source: hisi_acc_vfio_pci.c, the arcs RUNNING to STOP, STOP to STOP_COPY, STOP to RUNNING.
"""

import re

from plugins.hns import mailbox as mb
from plugins.hns.models.traffic import Traffic
from plugins.hns.registers import CONTEXT_WORDS, MAILBOX, QM_REGION, VF, pf_block
from plugins.hns.registers import ZIP as KIND
from tests.model_process import ModelProcess
from tests.plugins.hns.faults import Side
from tests.plugins.hns.served import MEMORY, MODULE, SECONDS
from vfu_server.testing import Guest, GuestMemory, save
from vfu_server.uapi import MigState

PF = pf_block(KIND)


def steps(calls: list[str]) -> list[str]:
    """The plugin's accesses in words, once each where it looks several times. Mailbox polls are left out."""
    found: list[str] = []
    for call in calls:
        how, region, at = re.match(r"(\w+)\((\w+), (\w+)", call).groups()
        if int(region, 16) != QM_REGION:
            continue
        offset = int(at, 16)
        if how == "write_wide":
            word0 = int(call.rpartition(", ")[2][2:4] + call.rpartition(", ")[2][:2], 16)
            step = f"{'get' if word0 >> 14 & 1 else 'set'} {mb.NAMES[word0 & 0xFF]}"
        elif MAILBOX <= offset < MAILBOX + 16:
            continue
        else:
            register = VF.at(offset) or PF.at(offset)
            step = f"{how} {register.name}"
        if not found or found[-1] != step:
            found.append(step)
    return found


def test_each_step_comes_in_its_turn(tmp_path):
    with ModelProcess(tmp_path, "zip", "--queues", "2", module=MODULE, time_scale=1.0) as model:
        side = Side(str(model.path))
        try:
            with GuestMemory.of(MEMORY) as memory, Guest(side.client(SECONDS), memory) as guest:
                guest.start()
                traffic = Traffic(guest, queues=2, depth=8, size=256, timeout=SECONDS)
                traffic.run_entries(10)
                traffic.finish()
                side.orders.arm(0)
                guest.client.set_mig_state(MigState.STOP)
                stopped = steps(side.orders.calls)
                side.orders.arm(0)
                guest.client.set_mig_state(MigState.STOP_COPY)
                assert b"".join(save(guest.client))
                saved = steps(side.orders.calls)
                guest.client.set_mig_state(MigState.STOP)
                side.orders.arm(0)
                guest.client.set_mig_state(MigState.RUNNING)
                started = steps(side.orders.calls)
        finally:
            side.close()
    # Which queues there are and whether they have contexts is asked first: what is at rest is read when it is stopped.
    assert stopped == [
        *("get SQC VFT", "get SQC table", "set pause function"),
        *("read qm_error_status", "read ifc_int_status", "read ifc_int_set", "read core_status"),
        *("write write_back_start", "read write_back_done"),
    ]
    masks = ("aeq_int_mask", "eq_int_mask", "ifc_int_source", "ifc_int_mask", "ifc_int_set", "page_size")
    rings = [f"{ring}{n}" for ring in ("eqc", "aeqc") for n in range(CONTEXT_WORDS)]
    whole = ["read vf_state", *(f"read {name}" for name in (*masks, *rings)), "get SQC table", "get CQC table"]
    whole += ["read eqc0", "write doorbell_eq_aeq", "read aeqc0", "write doorbell_eq_aeq"]
    assert [step for step in saved if step != "read queue_isolation"] == whole
    assert started == ["write ifc_int_source", "write ifc_int_mask", "write doorbell_sq_cq"]
