"""Bringing a physical function's firmware up and down, step by step.

It knows the order of commands, not what the function is used for afterwards. Each step says what it needs; a step that
fails raises, and the caller resets the function. Source: Linux' mlx5_core (main.c, fw.c) and rdma-core (mlx5_vfio.c).
"""

import logging
import secrets
import sys
from dataclasses import dataclass
from typing import Final

from plugins.mlx5 import contexts
from plugins.mlx5.bits import Layout
from plugins.mlx5.command_queue import CommandQueue
from plugins.mlx5.commands import Commands
from plugins.mlx5.contexts import CAP_GENERAL, CAP_GENERAL_2, GENERAL, GENERAL_2, MODE_CURRENT, MODE_MAX
from plugins.mlx5.layouts import (
    ACCESS_REG,
    DISABLE_HCA,
    ENABLE_HCA,
    HEAD,
    INIT_HCA,
    QUERY_ADAPTER,
    QUERY_HCA_CAP,
    QUERY_ISSI,
    SET_HCA_CAP,
    SET_ISSI,
    TEARDOWN_HCA,
)
from plugins.mlx5.pages import BOOT, INIT, Pages
from plugins.mlx5.status import CommandError

log = logging.getLogger(__name__)

BEFORE_SETUP_SECONDS: Final = 120.0
HOST_ENDIANNESS: Final = 0x7004
RECLAIM_PATIENCE: Final = 5.0
_BIG: Final = 0x80


@dataclass(frozen=True, slots=True)
class Caps:
    """One capability block with its names."""

    layout: Layout
    data: bytes

    def __getitem__(self, name: str) -> int:
        return self.layout.get(self.data, name)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What the firmware says of its function."""

    psid: str
    general: Caps
    general_2: Caps


async def query_caps(queue: Commands, kind: int, layout: Layout, mode: int = MODE_CURRENT, function: int = 0) -> Caps:
    """A capability block of the function itself, or of `function` (n + 1: its virtual function n)."""
    answer = await queue.call(
        QUERY_HCA_CAP, op_mod=kind << 1 | mode, other_function=int(function > 0), function_id=function
    )
    return Caps(layout, answer.data[HEAD : HEAD + contexts.CAP_SIZE])


async def set_caps(queue: Commands, kind: int, block: bytes, function: int = 0) -> None:
    """Set a whole capability block, as it was queried but for what is to change."""
    await queue.call(SET_HCA_CAP, op_mod=kind << 1, tail=block, other_function=int(function > 0), function_id=function)


async def bring_up(queue: CommandQueue, pages: Pages) -> Adapter:
    """From a function after reset to one that has its capabilities and may make objects."""
    await queue.segment.wait_initialized(BEFORE_SETUP_SECONDS)
    await queue.open()
    await queue.call(ENABLE_HCA, function_id=0)
    await _set_issi(queue)
    given = await pages.give_what_is_due(BOOT)
    await _tell_endianness(queue)
    await _set_general(queue)
    given += await pages.give_what_is_due(INIT)
    general = await query_caps(queue, CAP_GENERAL, GENERAL)
    owner = secrets.randbits(128) if general["sw_owner_id"] else 0
    await queue.call(INIT_HCA, sw_owner_id=owner)
    general = await query_caps(queue, CAP_GENERAL, GENERAL)
    if general["hca_cap_2"]:
        general_2 = await query_caps(queue, CAP_GENERAL_2, GENERAL_2)
    else:
        general_2 = Caps(GENERAL_2, bytes(contexts.CAP_SIZE))
    log.debug("%s: the firmware took %d pages to start", queue.name, given)
    return Adapter(await _psid(queue), general, general_2)


async def bring_down(queue: CommandQueue, pages: Pages) -> None:
    """The way back: afterwards the function can be brought up again without a reset."""
    await queue.call(TEARDOWN_HCA, profile=0)
    stay = await pages.reclaim(0, RECLAIM_PATIENCE)
    if stay:
        log.warning("%s: the firmware keeps %d pages", queue.name, stay)
    await queue.call(DISABLE_HCA, function_id=0)


async def _set_issi(queue: Commands) -> None:
    """Interface step 1 where it is offered; older firmware goes on with 0, as for Linux."""
    try:
        supported = (await queue.call(QUERY_ISSI))["supported"]
    except CommandError as error:
        log.debug("%s: interface step 0: %s", queue.name, error)
        return
    if supported & 2:
        await queue.call(SET_ISSI, current_issi=1)


async def _tell_endianness(queue: Commands) -> None:
    data = bytes((_BIG if sys.byteorder == "big" else 0,)) + bytes(15)
    await queue.call(ACCESS_REG, register_id=HOST_ENDIANNESS, tail=data, room=len(data))


async def _set_general(queue: Commands) -> None:
    """The current capabilities, with no checksums, pages of 4 KiB, and what newer firmware offers to be tidier."""
    offered = await query_caps(queue, CAP_GENERAL, GENERAL, MODE_MAX)
    block = bytearray((await query_caps(queue, CAP_GENERAL, GENERAL)).data)
    GENERAL["cmdif_checksum"].put(block, 0)
    GENERAL["log_uar_page_sz"].put(block, 0)
    for name in ("mkey_by_name", "release_all_pages"):
        if offered[name]:
            GENERAL[name].put(block, 1)
    await set_caps(queue, CAP_GENERAL, bytes(block))


async def _psid(queue: Commands) -> str:
    """The board's id, which the two ends of a migration must share; empty where the firmware does not tell."""
    try:
        number = (await queue.call(QUERY_ADAPTER))["psid"]
    except CommandError as error:
        log.debug("%s: no PSID: %s", queue.name, error)
        return ""
    raw = number.to_bytes(16, "big").rstrip(b"\0 ")
    return raw.decode("ascii", "replace")
