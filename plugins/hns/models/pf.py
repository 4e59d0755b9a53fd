"""The PF: queue ranges of all functions, errors, messages to and from VFs, and the migration windows of mode PF_CTRL.

Source of registers: Linux 7.2.8, drivers/crypto/hisilicon/qm.c and the kinds' own drivers. (model) A 64-bit store at
offset 0 of window n + 1 is the EQ/AEQ doorbell of function n, which is where the kernel's driver rings it. It must not
know how a VF works inside.
"""

from collections.abc import Mapping, Sequence

from plugins.hns.models.device import Shared
from plugins.hns.models.function import ABNORMAL_VECTOR, MESSAGE_VECTOR, QmFunction
from plugins.hns.models.generation import MOST_QUEUES
from plugins.hns.models.vf import VfModel
from plugins.hns.models.vft import CQC, SHAPER, SQC
from plugins.hns.registers import (
    DOORBELL_REGION,
    PF_BLOCKS,
    PF_SIZE,
    PF_WINDOW_STRIDE,
    PF_WINDOWS,
    WINDOW_AEQC,
    WINDOW_EQC,
)

VFT_SECONDS = 1e-5
_WINDOWS_END = PF_WINDOWS + 64 * PF_WINDOW_STRIDE
_V4_WRITE, _V4_READ = 0x104700, 0x104800
_ALL_VFS = 0x7F
_EVERY_VF_MESSAGE = 0xFFFF
_PLAIN = frozenset(
    {
        *("vft_op", "vft_type", "vft_function", "vft_data_low", "vft_data_high", "pf_message_target"),
        *("qm_ce_enable", "qm_fe_enable", "qm_nfe_enable", "qm_ce_threshold", "master_stop_mask", "memory_init_start"),
        *("core_ce", "core_nfe", "core_fe", "master_stop"),
    }
)


class PfModel(QmFunction):
    """The PF of `vfs`."""

    def __init__(self, shared: Shared, vfs: Sequence[VfModel]) -> None:
        self._own = dict.fromkeys(_PLAIN, 0)
        self._vft_ready = True
        self._vfs = vfs
        kind = shared.order.kind
        super().__init__(shared, 0, PF_SIZE, kind.pf_id, PF_BLOCKS[kind.name])
        shared.on_error = self._abnormal
        shared.on_message = self._hear

    def reset(self) -> None:
        """FLR: of the device as a whole, so of every VF (model)."""
        self.shared.reset()
        super().reset()
        self._own = dict.fromkeys(_PLAIN, 0)
        self._vft_ready = True
        for vf in self._vfs:
            vf.reset()

    def bus_reset(self) -> None:
        """(model) Who served the PF has gone: its own queues stop; VFs, ranges, errors and mode stay as they are."""
        super().reset()

    def read(self, region: int, offset: int, width: int) -> int:
        """BAR4 is written only."""
        if region == DOORBELL_REGION:
            return 0
        if PF_WINDOWS <= offset < _WINDOWS_END:
            return self._window_read(offset, width)
        if offset >= _V4_WRITE and offset < _V4_READ + 4 * 64:
            return self._message_read(offset, width)
        return self.qm_read(offset, width)

    def write(self, region: int, offset: int, width: int, value: int) -> None:
        """Registers, windows or a doorbell page."""
        if region == DOORBELL_REGION:
            self.page_write(offset, width, value)
        elif PF_WINDOWS <= offset < _WINDOWS_END:
            self._window_write(offset, width, value)
        elif offset == _V4_WRITE and width == 8 and self.shared.order.has_message_registers:
            self.shared.messages.write_to_vf(_EVERY_VF_MESSAGE, value)
        else:
            self.qm_write(offset, width, value)

    # registers of the PF alone

    def peek(self, name: str) -> int:  # noqa: C901 - one line for each register
        """What register `name` holds."""
        if name in _PLAIN:
            return self._own[name]
        shared = self.shared
        match name:
            case "qm_error_source":
                return shared.qm_errors.source
            case "qm_error_mask":
                return shared.qm_errors.mask
            case "qm_error_status":
                return shared.qm_errors.status
            case "core_source":
                return shared.core_errors.source
            case "core_mask":
                return shared.core_errors.mask
            case "core_status":
                return shared.core_errors.status
            case "memory_init_done":
                return self._own["memory_init_start"] & 1
            case "vft_ready":
                return int(self._vft_ready)
            case "pf_message_done":
                return shared.messages.for_vf
            case "pf_message_source":
                return shared.messages.for_pf
            case "cap_queues":
                return MOST_QUEUES | MOST_QUEUES << 11
            case "migration_region":
                return int(shared.pf_ctrl)
            case "pf_doorbell_drop":
                return shared.doorbell_drop
            case "master_state":
                return 3 if self._own["master_stop"] & 1 else 0
            case "ifc_int_source" | "ifc_int_status" | "ifc_int_set":
                return 0
        return super().peek(name)

    def poke(self, name: str, value: int) -> None:  # noqa: C901 - one line for each register
        """A write of a whole register."""
        if name in _PLAIN:
            self._own[name] = value
            return
        shared = self.shared
        match name:
            case "qm_error_source":
                shared.qm_errors.clear(value)
            case "qm_error_mask":
                shared.qm_errors.mask = value
            case "qm_error_set":
                shared.qm_errors.inject(value)
            case "core_source":
                shared.core_errors.clear(value)
            case "core_mask":
                shared.core_errors.mask = value
            case "core_set":
                shared.core_errors.inject(value)
            case "vft_start":
                self._start_vft(value)
            case "vft_ready":
                self._vft_ready = bool(value & 1)
            case "pf_message_send":
                self._send(value)
            case "pf_message_source":
                shared.messages.for_pf &= ~value
            case "migration_region":
                shared.pf_ctrl = bool(value & 1) and shared.order.has_pf_ctrl
            case "pf_doorbell_drop":
                shared.doorbell_drop = value if shared.order.has_doorbell_drop else 0
            case "ifc_int_set" | "ifc_int_source":
                return
            case _:
                super().poke(name, value)

    def _fault_bits(self, name: str) -> int:
        """Errors that show while a fault says so; the registers' other faults are those of any function."""
        if name == "qm_error_status" and not self.peek(name) and self.faults.take("ras-error"):
            return 1 << 5
        if name == "core_status" and not self.peek(name) and self.faults.take("core-error"):
            return 1 << 1
        return super()._fault_bits(name)

    # queue ranges

    def _start_vft(self, value: int) -> None:
        if not value & 1:
            return
        if self._vft_ready:
            self.violated("vft_ready")  # the driver clears it before it starts
        self._vft_ready = False
        if not self.faults.take("vft-stuck"):
            self.bus.call_later(VFT_SECONDS, self._end_vft)

    def _end_vft(self) -> None:
        own, vft = self._own, self.shared.vft
        kind, function = own["vft_type"], own["vft_function"]
        word = own["vft_data_low"] | own["vft_data_high"] << 32
        if kind not in (SQC, CQC, SHAPER):
            self.violated("vft_type")
        elif own["vft_op"] & 1:
            word = vft.word(kind, function & 0x3F if kind == SHAPER else function)
            own["vft_data_low"], own["vft_data_high"] = word & 0xFFFFFFFF, word >> 32
        elif kind == SQC:
            self._assign(function, word)
        elif kind == SHAPER and function & 0x3F < len(vft.shapers):
            vft.shapers[function & 0x3F] = word
        self._vft_ready = True

    def _assign(self, function: int, word: int) -> None:
        if not self.shared.vft.assign(function, word):
            self.violated("vft_range")
            return
        owner: QmFunction = self if function == 0 else self._vfs[function - 1]
        owner.queues.start(self.shared.vft.ranges[function].count)

    # messages and errors

    def _message_read(self, offset: int, width: int) -> int:
        vf = (offset - _V4_READ) // 4
        known = self.shared.order.has_message_registers and 1 <= vf < len(self.shared.messages.to_pf)
        if not known or width != 4 or offset % 4:
            self.violated("no_register")
            return 0
        return self.shared.messages.to_pf[vf] & 0xFFFFFFFF

    def _send(self, value: int) -> None:
        if value & 1:
            for function in self.shared.messages.targets(self._own["pf_message_target"] & _ALL_VFS, _ALL_VFS):
                self._vfs[function - 1].told_by_pf()

    def _hear(self) -> bool:
        if not self.bus.messages_enabled:
            return False
        self.bus.message(MESSAGE_VECTOR)
        return True

    def _abnormal(self) -> None:
        if self.bus.messages_enabled:
            self.bus.message(ABNORMAL_VECTOR)

    # windows of mode PF_CTRL

    def _window(self, offset: int) -> tuple[VfModel | None, int]:
        """The VF whose window holds `offset`, and the place in it; counted if there is none."""
        number, at = divmod(offset - PF_WINDOWS, PF_WINDOW_STRIDE)
        if not self.shared.pf_ctrl:
            self.violated("window_off")
        elif 1 <= number <= len(self._vfs):
            return self._vfs[number - 1], at
        else:
            self.violated("no_register")
        return None, at

    def _window_read(self, offset: int, width: int) -> int:
        vf, at = self._window(offset)
        if vf is None:
            return 0
        if at < WINDOW_EQC:
            return vf.qm_read(at, width)
        found = vf.shadow_place(at, width, WINDOW_EQC, WINDOW_AEQC)
        return 0 if found is None else vf.shadow_read(*found)

    def _window_write(self, offset: int, width: int, value: int) -> None:
        before = (offset - PF_WINDOWS) // PF_WINDOW_STRIDE - 1
        if offset % PF_WINDOW_STRIDE == 0 and width == 8 and self.shared.pf_ctrl and 1 <= before <= len(self._vfs):
            self._vfs[before - 1].doorbell(value, events=True)
            return
        vf, at = self._window(offset)
        if vf is None:
            return
        if at < WINDOW_EQC:
            vf.qm_write(at, width, value)
        elif (found := vf.shadow_place(at, width, WINDOW_EQC, WINDOW_AEQC)) is not None:
            vf.shadow_write(*found, value)

    def state(self) -> Mapping[str, int]:
        """As any function's, and the queue ranges."""
        ranges = enumerate(self.shared.vft.ranges)
        return {**super().state(), **{f"vft[{number}]": one.sqc_word for number, one in ranges}}
