"""What of the card travels, what does not get through, and what goes wrong."""

import e1000e
import pytest
import trio
from e1000e.engine import Engine
from e1000e.phy import Phy
from e1000e.registers import BAR_FLASH, BAR_IO, BAR_MAC, COUNTERS, MAC
from e1000e.statistics import Counted
from e1000e.traffic import Traffic

from vfu_server.testing import ReplyError, load, migrate_guest, save
from vfu_server.uapi import MigState

MODEL = "e1000e.model"
SECONDS = 60.0
START = 0x10000
ADDRESS = bytes.fromhex("020000c0ffee")
PHY = 1 << 21
READ, WRITE = 2 << 26 | PHY, 1 << 26 | PHY
PAGE, ADVERTISED, LED = 22, 4, 16
EN, RST = 1 << 1, 1 << 26
LSC, TXDW, RXQ0, TXQ0 = 4, 1, 1 << 20, 1 << 22


def get(guest, name):
    return guest.read(BAR_MAC, MAC[name].offset, 4)


def put(guest, name, value):
    guest.write(BAR_MAC, MAC[name].offset, 4, value)


def mdic(guest, command):
    """A command of MDIC, and its answer."""
    put(guest, "MDIC", command)
    while not (answer := get(guest, "MDIC")) & 1 << 28:
        pass
    return answer & 0xFFFF


def traffic_of(guest, messages="msi"):
    traffic = Traffic(guest, START, ADDRESS, SECONDS)
    traffic.bring_up(messages)
    return traffic


@pytest.fixture
def one(vfu_model, vfu_serve, vfu_guest):
    """A model and a guest that has started."""
    model = vfu_model(MODEL)
    return model, vfu_guest(vfu_serve(e1000e, model))


# --- what travels ---

VALUES = {
    "MTA[7].word": 0x80000001,
    "VFTA[127].word": 0xFF,
    "RA[15].RAL": 0x11223344,
    "RA[15].RAH": 0x80005566,
    "RETA[31].word": 0x80,
    "RSSRK[9].word": 0xDEADBEEF,
    "MRQC": 0x370001,
    "RFCTL": 0x8000,
    "RXCSUM": 0x300,
    "ITR": 0x100,
    "EITR[4].word": 0x200,
    "IVAR": 0x800A0908,
    "EIAC": 0x500000,
    "IAM": 0x500000,
    "CTRL_EXT": 1 << 24,
    "FFMT[127].word": 5,
    "FFVT[0].word": 6,
    "FFLT[3].word": 7,
    "IP4AT[3].word": 8,
    "WUFC": 0x3,
    "FCRTL": 0x80002000,
    "TX[1].TDBAL": 0x12340000,
    "TX[1].TDLEN": 0x100,
    "TX[1].TDH": 3,
    "TX[1].TDT": 3,
    "RX[1].RDH": 7,
    "RX[1].RDT": 5,
    "LEDCTL": 0x07061302,
    "TIPG": 0x00702008,
    "VET": 0x88A8,
    "PSRCTL": 0x00040402,
    "TIMINCA": 0x10000,
}


def test_what_a_driver_sets_is_there_afterwards(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    for name, value in VALUES.items():
        put(pair.source, name, value)
    migrate_guest(pair.source, pair.destination)
    assert {name: get(pair.destination, name) for name in VALUES} == VALUES


def test_registers_of_the_phy_and_the_answer_that_was_not_fetched_yet(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    guest = pair.source
    mdic(guest, WRITE | ADVERTISED << 16 | 0x01E1)
    mdic(guest, WRITE | PAGE << 16 | 3)
    mdic(guest, WRITE | LED << 16 | 0x0ABC)
    put(guest, "MDIC", READ | LED << 16)
    put(guest, "EERD", 2 << 2 | 1)
    migrate_guest(guest, pair.destination)
    guest = pair.destination
    assert get(guest, "MDIC") == READ | LED << 16 | 0x0ABC | 1 << 28
    assert get(guest, "EERD") >> 16 == 0x5634
    assert mdic(guest, READ | PAGE << 16) == 3
    mdic(guest, WRITE | PAGE << 16)
    assert mdic(guest, READ | ADVERTISED << 16) == 0x01E1


def test_what_was_counted_is_given_once(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    traffic = traffic_of(pair.source)
    traffic.exchange(20)
    octets = sum(len(traffic.frame(number)) + 4 for number in range(20))
    migrate_guest(pair.source, pair.destination)
    traffic.move(pair.destination)
    traffic.exchange(5)
    octets += sum(len(traffic.frame(number)) + 4 for number in range(20, 25))
    assert (get(pair.destination, "GPTC"), get(pair.destination, "GPRC")) == (25, 25)
    assert (get(pair.destination, "GPTC"), get(pair.destination, "GPRC")) == (0, 0)
    assert [get(pair.destination, name) for name in ("GOTCL", "GOTCH", "GOTCL", "GOTCH")] == [octets, 0, 0, 0]
    traffic.exchange(1)
    put(pair.destination, "CTRL", get(pair.destination, "CTRL") | RST)
    assert get(pair.destination, "GPTC") == 0


def test_counters_stay_at_their_end_and_lose_nothing_between_their_halves():
    hardware = dict.fromkeys(COUNTERS, 0)

    def read(name):
        value = hardware[name]
        if name.endswith("H"):
            hardware[f"{name[:-1]}L"] = 0
        if not name.endswith("L") or name[:-1] not in ("GORC", "GOTC", "TOR", "TOT"):
            hardware[name] = 0
        return value

    counted = Counted(read)
    counted.replace({"MPC": 0xFFFFFFF0, "GORC": 0x1_FFFFFFFF})
    hardware["MPC"] = 0x20
    assert counted.take(COUNTERS["MPC"]) == 0xFFFFFFFF
    hardware["GORCL"] = 1
    assert counted.take(COUNTERS["GORCL"]) == 0
    hardware["GORCL"] = 5  # comes in between
    assert counted.take(COUNTERS["GORCH"]) == 2
    assert counted.take(COUNTERS["GORCL"]) == 5
    assert counted.take(COUNTERS["GORCH"]) == 0


def test_causes_and_mask_arrive_and_interrupt(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    pair.source.enable_msi(1)
    put(pair.source, "ICS", TXDW | LSC)
    put(pair.source, "IMS", LSC)
    migrate_guest(pair.source, pair.destination)
    assert pair.destination.interrupts.wait(0, SECONDS) >= 1
    assert get(pair.destination, "IMS") == LSC
    assert get(pair.destination, "ICR") & (TXDW | LSC) == TXDW | LSC


def test_a_message_that_masked_its_cause_and_may_be_lost_is_sent_again(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    pair.source.enable_msix(3)
    put(pair.source, "IVAR", 0x8 | 0x9 << 8)
    put(pair.source, "EIAC", RXQ0 | TXQ0 | 1 << 21)  # the last has no message
    put(pair.source, "IMS", RXQ0 | TXQ0)
    put(pair.source, "ICS", TXQ0)
    assert pair.source.interrupts.wait(1, SECONDS) == 1
    assert get(pair.source, "IMS") == RXQ0
    migrate_guest(pair.source, pair.destination)
    assert pair.destination.interrupts.wait(1, SECONDS) == 1
    assert pair.destination.interrupts.count(0) == 0
    assert get(pair.destination, "IMS") == RXQ0
    assert get(pair.destination, "ICR") & (RXQ0 | TXQ0 | 1 << 21) == 0


def test_the_semaphores_stay_with_their_owner(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    put(pair.source, "EXTCNF_CTRL", 1 << 5)
    assert get(pair.source, "SWSM") & 1 == 0  # so it is ours now
    migrate_guest(pair.source, pair.destination)
    assert get(pair.destination, "EXTCNF_CTRL") & 1 << 5
    assert get(pair.destination, "SWSM") & 1 == 1
    put(pair.source, "SWSM", 0)
    assert get(pair.destination, "SWSM") & 1 == 1


def test_the_window_of_bar_2_knows_what_is_trapped(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    traffic_of(pair.source).exchange(3)
    pair.source.write(BAR_IO, 0, 4, MAC["GPTC"].offset)
    migrate_guest(pair.source, pair.destination)
    guest = pair.destination
    assert guest.read(BAR_IO, 0, 4) == MAC["GPTC"].offset
    assert (guest.read(BAR_IO, 4, 4), guest.read(BAR_IO, 4, 4)) == (3, 0)
    guest.write(BAR_IO, 0, 4, MAC["MTA[1].word"].offset)
    guest.write(BAR_IO, 4, 4, 0x42)
    assert get(guest, "MTA[1].word") == 0x42
    guest.write(BAR_IO, 0, 4, MAC["EEWR"].offset)
    guest.write(BAR_IO, 4, 4, 0x42)
    assert get(guest, "EEWR") == 0


@pytest.mark.parametrize("window", [False, True])
def test_a_reset_by_the_guest_is_the_end_of_what_was_counted(vfu_pair, window):
    pair = vfu_pair(e1000e, MODEL)
    traffic_of(pair.source).exchange(3)
    migrate_guest(pair.source, pair.destination)
    guest = pair.destination
    guest.write(BAR_IO, 0, 4, MAC["MTA[1].word"].offset)
    guest.write(BAR_IO, 4, 4, RST)
    if window:
        guest.write(BAR_IO, 0, 4, MAC["CTRL"].offset)
        guest.write(BAR_IO, 4, 4, RST)
    else:
        assert get(guest, "GPTC") == 3
        put(guest, "CTRL_DUP", RST)
    assert (get(guest, "GPTC"), get(guest, "GPRC")) == (0, 0)
    assert get(guest, "MTA[1].word") == RST


def test_a_function_that_sleeps_with_memory_off_is_moved(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    put(pair.source, "MTA[1].word", 0x42)
    pair.source.config.write(0xC8 + 4, 2, 3)
    pair.source.config.write(0x04, 2, 0)
    migrate_guest(pair.source, pair.destination)
    guest = pair.destination
    assert guest.config.read(0x04, 2) & 7 == 0
    guest.config.write(0x04, 2, 6)
    assert get(guest, "MTA[1].word") == 0x42


# --- what does not get through ---


def test_the_hardware_sees_nothing_while_it_is_stopped(one):
    model, guest = one
    traffic_of(guest)
    tail = get(guest, "RX[0].RDT")
    guest.client.set_mig_state(MigState.STOP)
    model.control("clear")
    for name in ("TX[0].TDT", "RX[0].RDT", "RCTL", "CTRL", "ICS", "MTA[0].word"):
        put(guest, name, 0x1234)
    for name in ("ICR", "GPTC", "SWSM"):
        get(guest, name)
    guest.write(BAR_IO, 0, 4, 0)
    assert get(guest, "RX[0].RDT") == tail
    assert sum(model.accesses(bar) for bar in (BAR_MAC, BAR_IO)) == 0
    guest.client.set_mig_state(MigState.RUNNING)
    assert get(guest, "RX[0].RDT") == tail


def test_the_nvm_is_never_written(one):
    model, guest = one
    for name in ("EEWR", "FLA", "FLSWCTL", "FLSWDATA", "EEC"):
        put(guest, name, 0x5A5A)
    guest.write(BAR_FLASH, 0, 4, 0x5A5A)
    state = model.registers()
    assert [state[name] for name in ("EEWR", "FLA", "FLSWCTL", "FLSWDATA")] == [0] * 4


@pytest.mark.parametrize("region", [BAR_MAC, BAR_IO])
def test_an_access_across_registers_is_refused(one, region):
    _, guest = one
    offset = MAC["GPTC"].offset + 2 if region == BAR_MAC else 2
    with pytest.raises(ReplyError):
        guest.client.region_read(region, offset, 4)
    assert get(guest, "GPTC") == 0


# --- what goes wrong ---


def test_frames_that_are_never_sent_make_the_stop_fail(one):
    model, guest = one
    traffic = traffic_of(guest)
    traffic.exchange(4)
    model.order_fault("tx-stuck", -1)
    traffic.send(3)
    with pytest.raises(ReplyError):
        guest.client.set_mig_state(MigState.STOP)
    assert guest.client.mig_state() is MigState.RUNNING
    model.order_fault("tx-stuck", 0)
    put(guest, "TX[0].TDT", get(guest, "TX[0].TDT"))
    traffic.exchange(4)
    assert model.registers()["station.repeated"] == 0


def test_frames_wait_where_the_transmitter_is_off_and_go_out_at_the_other_side(vfu_pair):
    pair = vfu_pair(e1000e, MODEL)
    traffic = traffic_of(pair.source)
    traffic.exchange(4)
    control = get(pair.source, "TCTL")
    put(pair.source, "TCTL", control & ~EN)
    traffic.send(6)
    migrate_guest(pair.source, pair.destination)
    traffic.move(pair.destination)
    put(pair.destination, "TCTL", control)
    traffic.exchange(4)
    assert [model.registers()["station.frames"] for model in pair.models] == [4, 10]
    assert traffic.count.lost == 0


@pytest.mark.parametrize("fault", ["phy-keeps", "phy-silent", "no-reset"])
def test_a_card_that_does_not_take_its_state(vfu_pair, fault):
    pair = vfu_pair(e1000e, MODEL)
    mdic(pair.source, WRITE | ADVERTISED << 16 | 0x01E1)
    pair.source.client.set_mig_state(MigState.STOP_COPY)
    state = b"".join(save(pair.source.client))
    guest = pair.destination
    guest.client.set_mig_state(MigState.RESUMING)
    load(guest.client, [state])
    pair.models[1].order_fault(fault, -1)
    with pytest.raises(ReplyError):
        guest.client.set_mig_state(MigState.STOP)
    pair.models[1].order_fault(fault, 0)
    guest.client.reset()
    assert guest.client.mig_state() is MigState.RUNNING


def test_a_save_that_is_given_up_leaves_the_page_of_the_phy(vfu_fake_host):
    host, scope, page, chosen = vfu_fake_host(MAC), trio.CancelScope(), [3], []

    def command(value):
        if value & ~0xFFFF == WRITE | PAGE << 16:
            page[0] = value & 0xFFFF
            chosen.append(page[0])
            if len(chosen) == 5:
                scope.cancel()
                return value  # no answer yet: somebody waits
        return value & ~0xFFFF | page[0] | 1 << 28

    async def main():
        phy = Phy(Engine(host))
        with scope:
            async with phy.owned():
                await phy.read_saved()

    host.on_write["MDIC"] = command
    trio.run(main)
    assert scope.cancelled_caught
    assert chosen == [0, 0, 0, 0, 0, 3]


def test_a_reset_leaves_nothing(one):
    _, guest = one
    traffic = traffic_of(guest)
    traffic.exchange(4)
    put(guest, "MTA[0].word", 1)
    mdic(guest, WRITE | ADVERTISED << 16 | 0x01E1)
    guest.client.reset()
    guest.firmware()
    assert [get(guest, name) for name in ("RCTL", "IMS", "TX[0].TDT", "MTA[0].word", "GPTC")] == [0] * 5
    assert mdic(guest, READ | ADVERTISED << 16) == 0x0DE1
