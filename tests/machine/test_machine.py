"""Several devices of one machine in one server: moved together without losing what they write to each other, kept in
step, and refused by name where they could not be.
"""

import errno

import pytest

from tests.machine.vmm import BARS, Vmm, server
from tests.plugins_synthetic.peer_model import REG_MISSING
from vfu_server.testing import ReplyError, load, save
from vfu_server.uapi import MigState

R, RP, S, SC, RES = (
    MigState.RUNNING,
    MigState.RUNNING_P2P,
    MigState.STOP,
    MigState.STOP_COPY,
    MigState.RESUMING,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("m")


@pytest.fixture(scope="module")
def served(folder):
    with server(folder, "here") as here:
        yield here


@pytest.fixture
def vmm(served):
    with Vmm(served) as vmm:
        yield vmm


def refused(client, state):
    with pytest.raises(ReplyError) as caught:
        client.set_mig_state(state)
    return caught.value.errno


def test_two_devices_that_write_to_each_other_move_and_nothing_is_lost(vmm, folder):
    with server(folder, "there") as there, Vmm(there) as arrival:
        vmm.begin()
        for _ in range(3):
            vmm.serve_more()
            arrival.set(RES)
            vmm.set(RP, SC)
            for device in BARS:
                load(arrival.clients[device], save(vmm.clients[device]))
            arrival.set(RP, R)
            vmm.set(S)
            arrival.serve_more()
            vmm, arrival = arrival, vmm
        vmm.nothing_is_missing()


def test_stopping_and_starting_loses_nothing(vmm):
    vmm.begin()
    for _ in range(5):
        vmm.serve_more(5)
        vmm.set(RP, S)
        vmm.set(RP, R)
    vmm.serve_more()
    vmm.nothing_is_missing()


def test_none_stops_while_another_may_start_dma(vmm, served):
    vmm.begin()
    vmm.serve_more(5)
    a, b = vmm.clients.values()
    for state in (S, SC):
        assert refused(a, state) == errno.EBUSY
        assert a.mig_state() is RP, "as far as it may go"
    served.wait_log(
        "b of machine guest may still start DMA to this device: all must be in a P2P state before one stops"
    )
    b.set_mig_state(RP)
    a.set_mig_state(S)
    assert refused(b, R) == errno.EBUSY
    assert b.mig_state() is RP
    served.wait_log(
        "a of machine guest takes no accesses from this device yet: all must be in a P2P state before one runs"
    )
    a.set_mig_state(RP)
    b.set_mig_state(R)
    a.set_mig_state(R)
    vmm.serve_more()
    vmm.nothing_is_missing()


def test_a_destination_gives_its_devices_up_one_after_the_other(vmm):
    """RESUMING is no stop of a guest: nothing of it is there yet."""
    a, b = vmm.clients.values()
    a.set_mig_state(RES)
    assert b.mig_state() is R
    b.set_mig_state(RES)


def test_who_has_no_client_is_nobodys_peer(served):
    with Vmm(served) as vmm:
        a, b = vmm.clients.values()
        assert refused(a, S) == errno.EBUSY
        b.close()
        served.wait_log("b: client disconnected")
        deadline_free(a)


def deadline_free(client):
    """The device of a client that has gone is brought back first; its peer may be asked meanwhile."""
    while True:
        try:
            client.set_mig_state(S)
            return
        except ReplyError as error:
            if error.errno != errno.EBUSY:
                raise


def test_a_peer_that_was_reset_amid_a_migration_holds_nobody_up_for_good(vmm):
    a, b = vmm.clients.values()
    vmm.set(RP)
    a.set_mig_state(S)
    b.reset()
    assert b.mig_state() is R
    b.set_mig_state(RP)
    a.set_mig_state(RP)
    vmm.set(R)


def test_without_the_word_of_the_operator_they_are_strangers_and_a_wrong_order_loses_what_was_sent(folder):
    """What the order is for: the same devices, stopped one after the other while they send."""
    with server(folder, "strangers", machine="") as strangers, Vmm(strangers) as vmm:
        vmm.begin()
        vmm.serve_more(5)
        a, b = vmm.clients.values()
        a.set_mig_state(S)
        sent = vmm.read("b", 0x18)
        vmm.serve_until(lambda: vmm.read("b", 0x18) > sent + 5, "b has nobody to wait for")
        b.set_mig_state(S)
        vmm.set(RP, R)
        vmm.serve_more(5)
        assert vmm.read("a", REG_MISSING) > 0


@pytest.mark.parametrize("lacking", ["a", "b"])
def test_without_p2p_the_second_one_is_not_migrated_and_is_told_why(folder, lacking):
    with server(folder, f"no-{lacking}", **{lacking: False}) as one, Vmm(one) as vmm:
        a, b = vmm.clients.values()
        assert a.migration_flags() != 0
        assert b.migration_flags() == 0
        assert refused(b, S) == errno.ENOTTY
        one.wait_log(
            "b: this device is presented but cannot be migrated: it belongs to machine guest together with a, and "
            f"{lacking} cannot hold back DMA to the others while they stop (P2P): of such a machine only one device is "
            "migrated, here a"
        )
        a.set_mig_state(SC)
        assert b"".join(save(a))
        a.set_mig_state(R)
