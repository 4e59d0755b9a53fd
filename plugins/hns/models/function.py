"""The queue manager's registers of one function, and what hangs on them: what PF and VF have in common.

Strict as hardware: a register wants its own width; an access that hardware would not take does nothing, reads all ones
(or 0 where no register is) and is counted as a violation. It must not know in which BAR, or window, it is seen.
"""

from collections import Counter
from collections.abc import Mapping

from plugins.hns.models.commands import Commands
from plugins.hns.models.device import Shared
from plugins.hns.models.eq import EventRing
from plugins.hns.models.mailbox import Mailbox
from plugins.hns.models.processor import Processor
from plugins.hns.models.queue import AEQ, EQ, Doorbell, parse_doorbell
from plugins.hns.models.queues import Queues
from plugins.hns.registers import (
    DOORBELL_PAGE,
    DOORBELL_REGION,
    DOORBELL_SQ_CQ,
    FUNCTION,
    MAILBOX,
    MAILBOX_SIZE,
    QM_REGION,
    REVISION_V3,
    VENDOR,
)
from vfu_server.model import Bar, Interrupts, Model
from vfu_server.pciconfig import PciConfig
from vfu_server.regmap import Access, Block, Register

VECTORS = 4
EQ_VECTOR, AEQ_VECTOR, MESSAGE_VECTOR, ABNORMAL_VECTOR = range(VECTORS)
CLASS_CODES = {"zip": 0x120000, "sec": 0x100000, "hpre": 0x100000}
_READY, _NOT_READY = 0, 1
_START = {"ifc_int_mask": 1, "page_size": 0, "vf_state": _NOT_READY, "doorbell_drop": 0, "message_write": 0}
_PLAIN = frozenset(_START) | {"queue_isolation"}


class QmFunction(Model):
    """Function `number` of the device: 0 the PF, VF index + 1. Served as a PCI function with BAR2 and BAR4."""

    can_reset = True

    def __init__(self, shared: Shared, number: int, size: int, device: int, block: Block = FUNCTION) -> None:
        super().__init__()
        order = shared.order
        self.shared = shared
        self.number = number
        self.block = block
        pages = shared.vft.ranges[number].count
        doorbells = DOORBELL_PAGE * (1 << max(0, pages - 1).bit_length())
        self.bars = {QM_REGION: Bar(size, wide=True), DOORBELL_REGION: Bar(doorbells, wide=True)}
        self.interrupts = Interrupts(msi=VECTORS)
        self.config = _config_space(order.kind.name, device, order.revision, self.bars)
        self.violations: Counter[str] = Counter()
        self.events = EventRing(self, EQ_VECTOR)
        self.errors = EventRing(self, AEQ_VECTOR)
        self.processor = Processor(self, order.kind.name, self.events, self.errors)
        self.queues = Queues(self, order.kind.name, order.entry_seconds, self.processor, self.violated)
        self.commands = Commands(self, self)
        self.mailbox = Mailbox(self, self.commands.execute, self.violated)
        self.values: dict[str, int] = {}
        self.resets = 0
        self.dropped = 0
        self._write_back_done = False
        self._write_back_runs = False
        self._start_values()

    def violated(self, name: str) -> None:
        """Somebody did what the hardware does not take."""
        self.violations[name] += 1

    def reset(self) -> None:
        """FLR and VFIO_DEVICE_RESET: start values, cache empty, not paused. Queue ranges are the PF's and stay."""
        self.resets += 1
        self._start_values()

    def bus_reset(self) -> None:
        """A PCI Express function is reset with its bus."""
        self.reset()

    def _start_values(self) -> None:
        self.values = {**_START, "queue_isolation": int(self.shared.order.isolation)}
        self.events.reset()
        self.errors.reset()
        self.mailbox.reset()
        self.queues.start(self.shared.vft.ranges[self.number].count)
        self._write_back_done = self._write_back_runs = False
        self.shared.messages.forget(self.number)
        self.shared.doorbell_drop &= ~(1 << self.number)

    # registers of the functional half

    def qm_read(self, offset: int, width: int) -> int:
        """A read at `offset` of the queue manager's registers."""
        if MAILBOX <= offset < MAILBOX + MAILBOX_SIZE:
            if width in (4, 8) and offset % width == 0:
                return self.mailbox.load(offset, width)
            self.violated("width")
            return (1 << 8 * width) - 1
        register = self.find(offset, width)
        if register is None:
            return 0 if self.block.at(offset) is None else (1 << 8 * width) - 1
        return self._part(register, offset, width, self.peek(register.name) ^ self._fault_bits(register.name))

    def qm_write(self, offset: int, width: int, value: int) -> None:
        """A write at `offset` of the queue manager's registers."""
        if MAILBOX <= offset < MAILBOX + MAILBOX_SIZE:
            self.mailbox.store(offset, width, value)
            return
        self.mailbox.other_access()
        register = self.find(offset, width)
        if register is None:
            return
        if register.access is Access.RO:
            self.violated("read_only")
        elif register.name.startswith("doorbell_") and register.width == 8:
            self.doorbell(value, register.name == "doorbell_eq_aeq")
        elif width != register.width:
            self.violated("width")
        else:
            self.poke(register.name, value)

    def find(self, offset: int, width: int) -> Register | None:
        """The register of an access that hardware takes; else None, and it is counted."""
        register = self.block.at(offset)
        if register is None:
            self.violated("no_register")
            return None
        whole = offset == register.offset and width == register.width
        half = register.width == 8 and width == 4 and offset % 4 == 0 and register.access is not Access.WO
        if not whole and not half:
            self.violated("width")
            return None
        return register

    @staticmethod
    def _part(register: Register, offset: int, width: int, value: int) -> int:
        return value >> 8 * (offset - register.offset) & ((1 << 8 * width) - 1)

    def peek(self, name: str) -> int:  # noqa: C901 - one line for each register
        """What register `name` holds, with no side effect."""
        if name in _PLAIN:
            return self.values[name]
        if name.startswith("cap_"):
            return self._capability(name)
        messages = self.shared.messages
        match name:
            case "aeq_int_source":
                return self.errors.source
            case "aeq_int_mask":
                return int(self.errors.masked)
            case "eq_int_source":
                return self.events.source
            case "eq_int_mask":
                return int(self.events.masked)
            case "ifc_int_source" | "ifc_int_status":
                return messages.for_vf >> self.number & 1
            case "ifc_int_set":
                return messages.for_pf >> self.number & 1
            case "write_back_start":
                return int(self._write_back_runs)
            case "write_back_done":
                return int(self._write_back_done)
            case "sub_version":
                return self.shared.order.sub_version
            case "message_read":
                return messages.to_vf[self.number] if self.shared.order.has_message_registers else 0
            case "mailbox0" | "mailbox1" | "mailbox2" | "mailbox3":
                at = 4 * int(name[-1])
                return int.from_bytes(self.mailbox.words[at : at + 4], "little")
        return 0

    def poke(self, name: str, value: int) -> None:  # noqa: C901 - one line for each register
        """A write of the whole register `name`."""
        match name:
            case "aeq_int_mask":
                self.errors.set_mask(value)
            case "eq_int_mask":
                self.events.set_mask(value)
            case "ifc_int_source":
                if value & 1:
                    self.shared.messages.for_vf &= ~(1 << self.number)
            case "ifc_int_set":
                if value & 1:
                    self._tell_pf()
            case "write_back_start":
                if value & 1:
                    self._write_back()
            case "message_write":
                self._write_message(value)
            case "vf_state" | "ifc_int_mask" | "queue_isolation":
                self.values[name] = value & 1
            case "page_size":
                self.values[name] = value & 3
            case "doorbell_drop":
                self.values[name] = value & 1 if self.shared.order.has_doorbell_drop else 0

    def _capability(self, name: str) -> int:
        if self.shared.order.version < REVISION_V3:
            return 0
        return self.block[name].reset or 0

    def _fault_bits(self, name: str) -> int:
        """Bit 0 of a register, turned over while a fault says so."""
        match name:
            case "vf_state":
                wrong = self.values[name] == _READY and self.faults.take("not-ready")
            case "ifc_int_status":
                wrong = not self.peek(name) and self.faults.take("message-waiting")
            case "ifc_int_set":
                wrong = not self.peek(name) and self.faults.take("message-unanswered")
            case _:
                wrong = False
        return int(wrong)

    # what writes start

    def _write_back(self) -> None:
        if self._write_back_runs:
            self.violated("write_back_busy")
            return
        self._write_back_done = False
        self._write_back_runs = True
        if not self.faults.take("write-back-stuck"):
            self.queues.write_back(self._write_back_ended)

    def _write_back_ended(self, worked: bool) -> None:
        self._write_back_runs = False
        self._write_back_done = worked

    def _write_message(self, value: int) -> None:
        if self.shared.order.has_message_registers:
            self.values["message_write"] = value
            self.shared.messages.to_pf[self.number] = value
        else:
            self.violated("no_register")

    def _tell_pf(self) -> None:
        """(model) Where nobody listens at the PF, the message is acknowledged after a while."""
        messages = self.shared.messages
        messages.for_pf |= 1 << self.number
        if not self.shared.on_message():
            self.bus.call_later(1e-3, self._acknowledge)

    def _acknowledge(self) -> None:
        self.shared.messages.for_pf &= ~(1 << self.number)

    def told_by_pf(self) -> None:
        """The PF has sent a message."""
        self.shared.messages.for_vf |= 1 << self.number
        if not self.values["ifc_int_mask"]:
            self.bus.message(MESSAGE_VECTOR)

    # doorbells

    def doorbell(self, value: int, events: bool) -> None:
        """A store to the SQ/CQ doorbell, or to the EQ/AEQ one."""
        if self.values["doorbell_drop"] or self.shared.doorbell_drop >> self.number & 1:
            self.dropped += 1
            return
        bell = parse_doorbell(value)
        if events:
            self._event_doorbell(bell)
        else:
            self.queues.doorbell(bell)

    def _event_doorbell(self, bell: Doorbell) -> None:
        if bell.command not in (EQ, AEQ):
            self.violated("doorbell_command")
        elif bell.queue:
            self.violated("doorbell_queue")
        elif not (self.events if bell.command == EQ else self.errors).doorbell(bell.index):
            self.violated("doorbell_index")
        elif bell.command == EQ:
            self.queues.room_for_events()

    def page_write(self, offset: int, width: int, value: int) -> None:
        """A store to BAR4: the doorbell page of one queue, and of no other."""
        if not self.values["queue_isolation"] or offset % DOORBELL_PAGE != DOORBELL_SQ_CQ:
            self.violated("no_register")
        elif width != 8:
            self.violated("width")
        elif parse_doorbell(value).queue != offset // DOORBELL_PAGE:
            self.violated("doorbell_page")
        else:
            self.doorbell(value, events=False)

    # migration registers

    def shadow_read(self, ring: EventRing, word: int) -> int:
        """Word `word` of EQC or AEQC."""
        return ring.words[word]

    def shadow_write(self, ring: EventRing, word: int, value: int) -> None:
        """A restore writes a word. It acts at once; while queues may work that is a violation."""
        if self.queues.live:
            self.violated("shadow_running")
        ring.set_word(word, value)

    def state(self) -> Mapping[str, int]:
        """All registers, EQC and AEQC, counts, queues whose contexts are in the cache, and the violations by name."""
        found = {r.name: self.peek(r.name) for r in self.block if r.access is not Access.WO}
        for name, ring in (("eqc", self.events), ("aeqc", self.errors)):
            found |= {f"{name}{index}": word for index, word in enumerate(ring.words)}
            found |= {f"{name}.written": ring.written, f"{name}.lost": ring.lost}
        for queue in self.queues.queues:
            if queue.sqc is not None and queue.cqc is not None:
                at = f"queue[{queue.number}]"
                found |= {f"{at}.sq_head": queue.sqc.head, f"{at}.sq_tail": queue.sqc.tail}
                found |= {f"{at}.cq_head": queue.cqc.head, f"{at}.cq_tail": queue.cqc.tail}
        found |= {
            "paused": self.queues.paused,
            "at_hand": sum(queue.at_hand for queue in self.queues.queues),
            "doorbells": self.queues.doorbells,
            "dropped": self.dropped,
            "restarts": self.queues.restarts,
            "write_backs": self.queues.write_backs,
            "commands": self.mailbox.commands,
            "completed": self.processor.completed,
            "dma_errors": self.processor.dma_errors,
            "resets": self.resets,
            "violations": self.violations.total(),
        }
        return found | {f"violation.{name}": count for name, count in sorted(self.violations.items())}


def _config_space(kind: str, device: int, revision: int, bars: Mapping[int, Bar]) -> PciConfig:
    config = PciConfig(
        vendor=VENDOR,
        device=device,
        class_code=CLASS_CODES[kind],
        revision=revision,
        subsystem_vendor=VENDOR,
        size=4096,
    )
    for index, bar in bars.items():
        config.add_bar(index, bar.size, wide=bar.wide)
    config.add_express(0x40, port_type=9)
    config.add_msi(0x80, VECTORS, maskable=True)
    config.add_power_management(0xA0)
    return config
