"""One accelerator put together: the functions that a model's process serves, by name.

It must not know sockets or options.
"""

from plugins.hns.models.device import Shared
from plugins.hns.models.generation import Order
from plugins.hns.models.pf import PfModel
from plugins.hns.models.vf import VfModel
from vfu_server.model import Model


def functions(order: Order) -> dict[str, Model]:
    """VF 0 first, as `vf0`, then the PF as `pf`, then `vf1` and so on. They belong under one lock."""
    shared = Shared(order)
    vfs = [VfModel(shared, index) for index in range(order.vfs)]
    pf = PfModel(shared, vfs)
    return {"vf0": vfs[0], "pf": pf, **{f"vf{index}": vf for index, vf in enumerate(vfs[1:], 1)}}
