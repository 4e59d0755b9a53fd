"""Which PF belongs to a VF: the operator's word, or the sibling of a model; and whether it can be the right one.

It must not know what the PF is asked.
"""

import errno
import logging
from contextlib import AsyncExitStack
from typing import Final

from plugins.hns.facts import Facts
from plugins.hns.options import NO_PF, Options
from plugins.hns.pf import PhysicalFunction, serve_pf
from vfu_server.companion import Companions
from vfu_server.errors import HostError
from vfu_server.host_device import HostDevice

log = logging.getLogger(__name__)

SIBLING: Final = "pf"
"""The word that a model's PF goes by."""


async def find_pf(
    host: HostDevice, facts: Facts, options: Options, companions: Companions, stack: AsyncExitStack
) -> PhysicalFunction | None:
    """The PF, which is left when `stack` is; None: there is none to be found. HostError: not there, or a wrong one.

    A device behind a socket may be a model, whose PF is a sibling of that socket. Under a kernel nobody is looked for:
    the PF mostly has its own driver there.
    """
    if options.pf == NO_PF or (options.pf is None and not host.dma_by_messages):
        return None
    try:
        pf = await stack.enter_async_context(companions.open(options.pf or SIBLING, serve_pf))
    except HostError as error:
        if options.pf is None and error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            log.debug("%s has no sibling: %s", host.name, error)
            return None
        error.add_note(f"as the PF of {host.name}")
        raise
    if pf.kind is not facts.kind:
        raise HostError(f"{pf.name} is the PF of a {pf.kind.name}, {host.name} is a {facts.kind.name}", errno.EINVAL)
    return pf
