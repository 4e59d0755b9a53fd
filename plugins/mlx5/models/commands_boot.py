"""Commands that bring a function up and down, tell and set capabilities, and access registers.

It must not know queues and objects; what a step changes beyond the function's own stage is the card's.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from plugins.mlx5.models import caps, messages
from plugins.mlx5.models.caps import Capabilities
from plugins.mlx5.models.firmware import Call, Command, Stage
from plugins.mlx5.models.layouts import Layout, bits, u32
from plugins.mlx5.models.messages import PLAIN_OUT
from plugins.mlx5.models.options import Options
from plugins.mlx5.models.status import RefusedError, Status

OK = PLAIN_OUT.pack()
ISSI_BITS = 0b11
IEEE_VENDOR = 0x0002C9
VSD_VENDOR = 0x15B3
HOST_ENDIANNESS, PORT_STATE, TIMEOUTS = 0x7004, 0x5006, 0xC00E
REGISTER_SIZES = {HOST_ENDIANNESS: 0x10, PORT_STATE: 0x10, TIMEOUTS: 0x40}
PORT_LAYOUT = Layout(
    "PAOS", 0x10, bits("port", 0, 23, 16), bits("admin", 0, 11, 8), bits("operational", 0, 3, 0), bits("select", 4, 31)
)
TIMEOUT_LAYOUT = Layout("DTOR", 0x40, u32("teardown", 0x28), u32("reclaim_pages", 0x30), u32("reclaim_vfs", 0x34))
SECONDS = 1 << 29


class Boot(Protocol):
    """What the commands need of the card."""

    options: Options

    def enable(self, function: int) -> None: ...
    def disable(self, function: int) -> None: ...
    def initialize(self) -> None: ...
    def tear_down(self, profile: int) -> None: ...
    def set_issi(self, issi: int) -> None: ...
    def issi(self) -> int: ...
    def caps_of(self, function: int, *, by_vhca: bool) -> Capabilities: ...
    def set_own(self, values: dict[str, int]) -> None: ...


class BootCommands:
    """The PF's."""

    def __init__(self, card: Boot) -> None:
        self._card = card
        self._registers = {HOST_ENDIANNESS: bytes(16), PORT_STATE: PORT_LAYOUT.pack(port=1, admin=1, operational=1)}

    def commands(self) -> Iterable[Command]:
        """All of them."""
        both = frozenset({0, 1})
        return (
            Command(0x104, messages.ENABLE_HCA, self._enable, stage=Stage.RESET),
            Command(0x105, messages.DISABLE_HCA, self._disable, stage=Stage.ENABLED),
            Command(0x10A, messages.QUERY_ISSI, self._query_issi, out=0x70, stage=Stage.ENABLED),
            Command(0x10B, messages.SET_ISSI, self._set_issi, stage=Stage.ENABLED),
            Command(0x102, messages.INIT_HCA, self._init, stage=Stage.ENABLED),
            Command(0x103, messages.TEARDOWN_HCA, self._tear_down, stage=Stage.READY),
            Command(0x101, messages.QUERY_ADAPTER, self._adapter, out=0x110, stage=Stage.READY),
            Command(0x805, messages.ACCESS_REG, self._register, stage=Stage.ENABLED, op_mods=both, element=4),
            Command(0x100, messages.QUERY_HCA_CAP, self._query_cap, out=0x1010, stage=Stage.ENABLED, op_mods=None),
            Command(0x109, messages.SET_HCA_CAP, self._set_cap, stage=Stage.ENABLED, op_mods=None, element=0x1000),
        )

    def _function(self, call: Call) -> int:
        if call.values["embedded_cpu_function"]:
            raise RefusedError(Status.BAD_PARAM, 0x111, "there is no embedded CPU")
        if call.values["function_id_type"]:
            raise RefusedError(Status.BAD_PARAM, 0x112, "functions are named by their number here")
        return call.values["function_id"]

    def _enable(self, call: Call) -> bytes:
        self._card.enable(self._function(call))
        return OK

    def _disable(self, call: Call) -> bytes:
        self._card.disable(self._function(call))
        return OK

    def _query_issi(self, call: Call) -> bytes:
        return messages.QUERY_ISSI_OUT.pack(current_issi=self._card.issi(), supported_issi=ISSI_BITS)

    def _set_issi(self, call: Call) -> bytes:
        wanted = call.values["current_issi"]
        if not ISSI_BITS >> min(wanted, 32) & 1:
            raise RefusedError(Status.BAD_PARAM, 0x113, f"there is no interface revision {wanted}")
        self._card.set_issi(wanted)
        return OK

    def _init(self, call: Call) -> bytes:
        self._card.initialize()
        return OK

    def _tear_down(self, call: Call) -> bytes:
        profile = call.values["profile"]
        if profile > 2:
            raise RefusedError(Status.BAD_PARAM, 0x114, f"there is no way {profile} of tearing down")
        self._card.tear_down(profile)
        return messages.TEARDOWN_HCA_OUT.pack()

    def _adapter(self, call: Call) -> bytes:
        return adapter(self._card.options)

    def _register(self, call: Call) -> bytes:
        number = call.values["register_id"]
        size = REGISTER_SIZES.get(number)
        if size is None:
            raise RefusedError(Status.BAD_PARAM, 0x115, f"there is no register {number:#x}")
        if len(call.tail) != size:
            raise RefusedError(Status.BAD_INPUT_LENGTH, 0x104, f"register {number:#x} with {len(call.tail)} bytes")
        call.want_room(0x10 + size)
        if call.values["argument"]:
            raise RefusedError(Status.BAD_PARAM, 0x116, f"register {number:#x} with an argument")
        if number == TIMEOUTS:
            if call.op_mod == 0:
                raise RefusedError(Status.BAD_PARAM, 0x117, "the register of time-outs is read only")
            values = TIMEOUT_LAYOUT.pack(teardown=SECONDS | 3, reclaim_pages=SECONDS | 5, reclaim_vfs=SECONDS | 120)
            return OK + values
        if call.op_mod == 1:
            return OK + self._registers[number]
        if number == HOST_ENDIANNESS and (call.tail[0] not in (0, 0x80) or any(call.tail[1:])):
            raise RefusedError(Status.BAD_PARAM, 0x118, f"the host's endianness cannot be {call.tail.hex()}")
        if number == PORT_STATE and PORT_LAYOUT.get(call.tail, "port") != 1:
            raise RefusedError(Status.BAD_PARAM, 0x119, "there is port 1 only")
        self._registers[number] = call.tail
        return OK + call.tail

    # capabilities

    def _target(self, call: Call) -> Capabilities:
        values = call.values
        if values["ec_vf_function"]:
            raise RefusedError(Status.BAD_PARAM, 0x111, "there is no embedded CPU")
        if not values["other_function"]:
            if values["function_id"] or values["function_id_type"]:
                raise RefusedError(Status.BAD_PARAM, 0x11A, "a function's own capabilities have function_id 0")
            return self._card.caps_of(0, by_vhca=False)
        return self._card.caps_of(values["function_id"], by_vhca=bool(values["function_id_type"]))

    def _query_cap(self, call: Call) -> bytes:
        return query_cap(self._target(call), call.op_mod)

    def _set_cap(self, call: Call) -> bytes:
        if len(call.tail) != messages.CAP_SIZE:
            raise RefusedError(Status.BAD_INPUT_LENGTH, 0x104, f"a block of {len(call.tail)} bytes")
        kind, mode, target = call.op_mod >> 1, call.op_mod & 1, self._target(call)
        other = bool(call.values["other_function"])
        settable = caps.OTHER_SETTABLE.get(kind) if other else (caps.OWN_SETTABLE if kind == caps.GENERAL else None)
        if settable is None or mode:
            raise RefusedError(Status.BAD_PARAM, 0x11B, f"capabilities {kind:#x} cannot be set so")
        before = target.block(kind, caps.MAX if other and kind != caps.GENERAL else caps.CURRENT)
        layout = caps.LAYOUTS[kind]
        assert before is not None
        names, unknown = layout.changed(before, call.tail)
        if unknown or names - settable:
            wrong = ", ".join(sorted(names - settable)) or "bits without a name"
            raise RefusedError(Status.BAD_PARAM, 0x11C, f"a driver may not change {wrong}")
        values = {name: layout.get(call.tail, name) for name in names}
        if other:
            self._set_other(target, values)
            return OK
        for name, value in values.items():
            if value > target.get(name, caps.MAX):
                raise RefusedError(Status.BAD_PARAM, 0x11D, f"{name} cannot be {value:#x}")
        self._card.set_own(values)
        return OK

    def _set_other(self, target: Capabilities, values: dict[str, int]) -> None:
        own = self._card.caps_of(0, by_vhca=False)
        if not own.get("vhca_resource_manager"):
            raise RefusedError(Status.BAD_PARAM, 0x11E, "this PF does not manage others")
        for name, value in values.items():
            if name == "dynamic_msix_table_size" and value > own.get("num_total_dynamic_vf_msix"):
                raise RefusedError(Status.LIMIT, 0x11F, f"{value} vectors for a VF")
            target.set(name, value, caps.MAX)
            target.set(name, value)


def adapter(options: Options) -> bytes:
    """The answer to QUERY_ADAPTER."""
    return messages.QUERY_ADAPTER_OUT.pack(
        ieee_vendor_id=IEEE_VENDOR,
        vsd_vendor_id=VSD_VENDOR,
        psid=int.from_bytes(options.psid.encode()[:16].ljust(16, b"\0"), "big"),
    )


def query_cap(target: Capabilities, op_mod: int) -> bytes:
    """The answer to QUERY_HCA_CAP."""
    block = target.block(op_mod >> 1, op_mod & 1)
    if block is None:
        raise RefusedError(Status.BAD_PARAM, 0x11B, f"there are no capabilities {op_mod >> 1:#x}")
    return OK + block


class VfCommands:
    """The few commands that a VF's own queue takes (model)."""

    def __init__(
        self, options: Options, own: Capabilities, get_issi: Callable[[], int], set_issi: Callable[[int], None]
    ) -> None:
        self._options = options
        self._caps = own
        self._get_issi = get_issi
        self._set = set_issi

    def commands(self) -> Iterable[Command]:
        """All of them."""
        return (
            Command(0x100, messages.QUERY_HCA_CAP, self._query_cap, out=0x1010, op_mods=None),
            Command(0x101, messages.QUERY_ADAPTER, self._adapter, out=0x110),
            Command(0x10A, messages.QUERY_ISSI, self._query_issi, out=0x70),
            Command(0x10B, messages.SET_ISSI, self._set_issi),
        )

    def _query_cap(self, call: Call) -> bytes:
        if call.values["other_function"] or call.values["function_id"]:
            raise RefusedError(Status.BAD_PARAM, 0x11A, "a VF sees its own capabilities only")
        return query_cap(self._caps, call.op_mod)

    def _adapter(self, call: Call) -> bytes:
        return adapter(self._options)

    def _query_issi(self, call: Call) -> bytes:
        return messages.QUERY_ISSI_OUT.pack(current_issi=self._get_issi(), supported_issi=ISSI_BITS)

    def _set_issi(self, call: Call) -> bytes:
        if not ISSI_BITS >> min(call.values["current_issi"], 32) & 1:
            raise RefusedError(Status.BAD_PARAM, 0x113, "there is no such interface revision")
        self._set(call.values["current_issi"])
        return OK
