"""A guest moves with its edu between two QEMUs, each with a server of its own; qtest is its processor."""

import hashlib
from contextlib import suppress
from pathlib import Path

import pytest

from tests.qemu_migration import edu_guest
from tests.qemu_migration.edu_guest import BAR, BUFFER, MAILBOX, PAGE, begin, copy, finish, set_up, until
from tests.qemu_migration.monitor import QmpError
from tests.qemu_migration.moves import move, prepare, start
from tests.qemu_migration.side import SLOT, Side, side
from tools.qemu_root import QemuRoot

DATA = bytes((7 * at + at // 256) % 256 for at in range(PAGE))
INCOMING = ("-incoming", "defer")


def memory(one: Side, file: Path) -> bytes:
    """A digest of all of the guest's memory."""
    one.monitor.execute("pmemsave", val=0x100000, size=(160 << 20) - 0x100000, filename=str(file))
    with file.open("rb") as saved:
        return hashlib.file_digest(saved, "sha256").digest()


def test_config_registers_buffer_and_memory_arrive(qemu: QemuRoot, tmp_path: Path) -> None:
    with side(qemu, tmp_path / "a") as first, side(qemu, tmp_path / "b", *INCOMING) as second:
        prepare(first, second)
        guest = first.guest
        set_up(guest)
        guest.write(BAR + 4, 4, 0x12345678)
        guest.store(0x100000, DATA)
        copy(guest, 0x100000, 0x500000, PAGE)
        config = [guest.config_read(SLOT, at, 4) for at in range(0, 256, 4)]
        found = move(first, second)
        assert found["vfio"]["transferred"] > PAGE
        assert memory(first, tmp_path / "left") == memory(second, tmp_path / "arrived")
        guest = second.guest
        assert [guest.config_read(SLOT, at, 4) for at in range(0, 256, 4)] == config
        assert guest.read(BAR + 4, 4) == 0xEDCBA987
        assert guest.load(0x500000, PAGE) == DATA
        begin(guest, BUFFER, 0x600000, PAGE, out=True)
        finish(guest)
        assert guest.load(0x600000, PAGE) == DATA


@pytest.mark.parametrize("channels", [0, 2], ids=["one channel", "multifd"])
def test_there_and_back_with_a_transfer_in_flight(qemu: QemuRoot, tmp_path: Path, channels: int) -> None:
    """What the transfer writes while the guest moves is there, its interrupt comes once, by any way."""
    capabilities = {"multifd": True} if channels else {}
    parameters = {"multifd_channels": channels} if channels else {}
    guest_memory = 0x500000
    with side(qemu, tmp_path / "0") as source:
        prepare(source, capabilities=capabilities, **parameters)
        set_up(source.guest)
        source.guest.store(0x100000, DATA)
        begin(source.guest, 0x100000, BUFFER, PAGE, out=False)
        finish(source.guest)
        with side(qemu, tmp_path / "1", *INCOMING) as destination:
            prepare(destination, capabilities=capabilities, **parameters)
            begin(source.guest, BUFFER, guest_memory, PAGE, out=True)
            move(source, destination)
            finish(destination.guest)
            assert destination.guest.load(guest_memory, PAGE) == DATA
            destination.guest.store(guest_memory, bytes(PAGE))
            with side(qemu, tmp_path / "2", *INCOMING) as last:
                prepare(last, capabilities=capabilities, **parameters)
                begin(destination.guest, BUFFER, guest_memory, PAGE, out=True)
                move(destination, last)
                finish(last.guest)
                assert last.guest.load(guest_memory, PAGE) == DATA


def test_an_interrupt_right_before_the_stop_is_not_lost(qemu: QemuRoot, tmp_path: Path) -> None:
    """Raised while the migration waits at its last stage: it is in the eventfd when the device stops."""
    with side(qemu, tmp_path / "a") as first, side(qemu, tmp_path / "b", *INCOMING) as second:
        prepare(first, second)
        set_up(first.guest)
        first.guest.write(BAR + 0x60, 4, 0x2)
        move(first, second)
        assert second.guest.read(MAILBOX, 4) == edu_guest.MESSAGE
        assert second.guest.read(BAR + 0x24, 4) == 0x2


def test_the_pin_is_taken_down_at_the_destination(qemu: QemuRoot, tmp_path: Path) -> None:
    def pin_is_raised(guest: object) -> bool:
        guest.ask("outb 0xa0 0x0a")  # type: ignore[attr-defined]
        return bool(int(guest.ask("inb 0xa0")[0], 16) & 0x08)  # type: ignore[attr-defined]

    with side(qemu, tmp_path / "a") as first, side(qemu, tmp_path / "b", *INCOMING) as second:
        prepare(first, second)
        first.guest.config_write(SLOT, 0x10, 4, BAR)
        first.guest.config_write(SLOT, 0x04, 2, 0x6)
        for register in (*range(0x60, 0x64), *range(0x68, 0x6C)):
            first.guest.config_write(31, register, 1, 11)
        first.guest.ask("outb 0x4d1 0x08")
        first.guest.write(BAR + 0x60, 4, 0x10)
        until(lambda: pin_is_raised(first.guest), "the pin is not raised")
        move(first, second)
        assert pin_is_raised(second.guest)
        assert second.guest.read(BAR + 0x24, 4) == 0x10
        second.guest.write(BAR + 0x64, 4, 0x10)
        until(lambda: not pin_is_raised(second.guest), "the pin is stuck")
        second.guest.write(BAR + 0x60, 4, 0x20)
        until(lambda: pin_is_raised(second.guest), "the pin is not raised again")


def test_cancelled_in_the_middle_and_moved_after_all(qemu: QemuRoot, tmp_path: Path) -> None:
    with side(qemu, tmp_path / "a") as first, side(qemu, tmp_path / "b", *INCOMING) as second:
        prepare(first, second, max_bandwidth=1 << 20)
        set_up(first.guest)
        first.guest.store(0x100000, DATA)
        start(first, second)
        assert first.monitor.wait_migration("active")["status"] == "active"
        copy(first.guest, 0x100000, 0x500000, PAGE)
        first.monitor.execute("migrate_cancel")
        assert first.monitor.wait_migration()["status"] == "cancelled"
        assert first.status() == "running"
        copy(first.guest, 0x500000, 0x600000, PAGE)
        with side(qemu, tmp_path / "c", *INCOMING) as third:
            prepare(first, third)
            move(first, third)
            assert third.guest.load(0x600000, PAGE) == DATA
            copy(third.guest, 0x600000, 0x700000, PAGE)
            assert third.guest.load(0x700000, PAGE) == DATA


def test_the_limit_of_the_switch_over_is_kept(qemu: QemuRoot, tmp_path: Path) -> None:
    """All memory counts as dirty here, so a small limit cannot be met: the guest keeps running, until it is raised."""
    with side(qemu, tmp_path / "a") as first, side(qemu, tmp_path / "b", *INCOMING) as second:
        prepare(first, second, downtime_limit=1)
        set_up(first.guest)
        first.guest.store(0x100000, DATA)
        for page in range(0x800000, 0x4000000, PAGE):
            first.guest.ask(f"memset {page:#x} {PAGE:#x} {page >> 12 & 0xFF | 1:#x}")
        start(first, second)
        rounds = 0
        while rounds < 4:
            found = first.monitor.wait_migration("active")
            assert found["status"] == "active"
            rounds = found.get("ram", {}).get("dirty-sync-count", 0)
        copy(first.guest, 0x100000, 0x500000, PAGE)
        assert first.status() == "running"
        first.monitor.execute("migrate-set-parameters", downtime_limit=60_000)
        assert first.monitor.wait_migration()["status"] == "completed"
        second.monitor.wait_event("RESUME")
        assert second.guest.load(0x500000, PAGE) == DATA


@pytest.mark.parametrize("capability", ["postcopy-ram", "background-snapshot"])
def test_what_vfio_cannot_do_is_refused(qemu: QemuRoot, tmp_path: Path, capability: str) -> None:
    with side(qemu, tmp_path / "a") as first:
        set_up(first.guest)
        with suppress(QmpError):  # a kernel without userfaultfd refuses the capability itself
            prepare(first, capabilities={capability: True})
        found = {each["capability"]: each["state"] for each in first.monitor.execute("query-migrate-capabilities")}
        if found[capability]:
            with pytest.raises(QmpError, match="not supported with"):
                first.monitor.execute("migrate", uri=f"file:{tmp_path / 'state'}")
        assert first.status() == "running"
        assert first.guest.read(BAR, 4) == 0x010000ED


@pytest.mark.parametrize("mode", ["cpr-transfer", "cpr-exec"])
def test_handing_over_is_refused(qemu: QemuRoot, tmp_path: Path, mode: str) -> None:
    with side(qemu, tmp_path / "a", "-machine", "aux-ram-share=on") as first:
        prepare(first, mode=mode, cpr_exec_command=["true"])
        with pytest.raises(QmpError, match="not supported for vfio-user"):
            first.monitor.execute("migrate", uri=f"unix:{tmp_path / 'other'}")
        assert first.status() == "running"


@pytest.mark.parametrize("mode", ["normal", "cpr-reboot"])
def test_to_a_file_and_back(qemu: QemuRoot, tmp_path: Path, mode: str) -> None:
    state = tmp_path / "state"
    with side(qemu, tmp_path / "a") as first:
        prepare(first, mode=mode, capabilities={"return-path": False})
        set_up(first.guest)
        first.guest.store(0x100000, DATA)
        begin(first.guest, 0x100000, BUFFER, PAGE, out=False)
        finish(first.guest)
        first.monitor.execute("migrate", uri=f"file:{state}")
        assert first.monitor.wait_migration()["status"] == "completed", first.log
    with side(qemu, tmp_path / "b", *INCOMING) as second:
        prepare(second, mode=mode, capabilities={"return-path": False})
        second.monitor.execute("migrate-incoming", uri=f"file:{state}")
        second.monitor.wait_event("MIGRATION", status="completed")
        if second.status() != "running":
            second.monitor.execute("cont")
        begin(second.guest, BUFFER, 0x600000, PAGE, out=True)
        finish(second.guest)
        assert second.guest.load(0x600000, PAGE) == DATA
