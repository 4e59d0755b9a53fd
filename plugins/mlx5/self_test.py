"""What a person with a card wants to know before a first migration: read from the firmware and put in the log.

It sends queries only; what serving the function does anyway (bringing the physical function up, enabling the virtual
one) has been done before.
"""

import logging
from typing import Final

import trio

from plugins.mlx5 import gate
from plugins.mlx5.boot import query_caps
from plugins.mlx5.contexts import ADV_VIRTUALIZATION, CAP_ADV_VIRTUALIZATION
from plugins.mlx5.pf import PhysicalFunction, VirtualFunction
from plugins.mlx5.status import BAD_RESOURCE_STATE, CommandError
from plugins.mlx5.vhca import Query, Vhca
from vfu_server.errors import HostError

log = logging.getLogger(__name__)

PATIENCE: Final = 40
PAUSE: Final = 0.05


async def run(owner: PhysicalFunction, function: VirtualFunction) -> None:
    """Look at everything that a migration needs, one line each. It raises nothing."""
    for text in await lines(owner, function):
        log.info("self-test: %s", text)


async def lines(owner: PhysicalFunction, function: VirtualFunction) -> list[str]:
    """What was found."""
    adapter = owner.adapter
    found = [
        f"physical function {owner.host.name}: firmware {owner.firmware}, board {adapter.psid or 'unknown'}",
        f"health: {owner.segment.health()}",
        f"pages given to the firmware: {owner.pages.total}",
        f"virtual function {function.index}: vhca_id {function.vhca_id:#x}",
    ]
    found += [f"lacks {one}" for one in function.missing] or ["every capability that a migration needs is there"]
    bits = gate.features(adapter)
    found += [f"{name}: {'yes' if bits & bit else 'no'}" for bit, name in gate.FEATURE_NAMES.items()]
    try:
        if gate.can_track_pages(adapter.general, adapter.general_2):
            caps = await query_caps(owner.queue, CAP_ADV_VIRTUALIZATION, ADV_VIRTUALIZATION)
            found.append(f"log of pages: {caps.layout.decode(caps.data)}")
        if not function.missing:
            vhca = Vhca(owner.queue, function.vhca_id, chunks=bool(bits & gate.FEATURE_CHUNKS))
            query = await _first_query(vhca)
            found.append(f"its state: {query.required} bytes at least for the first image, {query.size} in all")
    except HostError as error:
        found.append(f"failed: {error}")
    return found


async def _first_query(vhca: Vhca) -> Query:
    """A function that was enabled just now may still wait for its pages."""
    for _ in range(PATIENCE):
        try:
            return await vhca.query(incremental=False)
        except CommandError as error:
            if error.status != BAD_RESOURCE_STATE:
                raise
        await trio.sleep(PAUSE)
    return await vhca.query(incremental=False)
