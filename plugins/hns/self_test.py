"""A look at all registers that can be read without an effect, for the log: what this hardware says where we guess.

It writes nothing, and must not judge.
"""

import logging

from plugins.hns.facts import Facts
from plugins.hns.pf import PhysicalFunction
from plugins.hns.registers import CONTEXT_WORDS, FUNCTION, QM_REGION
from plugins.hns.window import Window
from vfu_server.errors import HostError
from vfu_server.regmap import READABLE

log = logging.getLogger(__name__)


def log_registers(window: Window, facts: Facts, pf: PhysicalFunction | None) -> None:
    """One line for each register, of the function, its migration half, and of its PF's error status."""
    name = window.name
    log.info("%s: self-test of a %s, revision %#x; nothing is written", name, facts.variant, facts.revision)
    for register in FUNCTION:
        if register.access in READABLE:
            value = window.vf.read(QM_REGION, register.offset, register.width)
            log.info("%s: %#06x %s", name, register.offset, register.decode(value))
    for word in [f"{which}{i}" for which in ("eqc", "aeqc") for i in range(CONTEXT_WORDS)]:
        log.info("%s: %#06x %s", name, window.offset(word), window.show(word))
    if pf is None:
        log.info("%s: no PF is known", name)
        return
    for status in ("qm_error_status", "core_status", "queue_isolation"):
        try:
            log.info("%s: PF %s: %s", name, pf.name, pf.register(status).decode(pf.read(status)))
        except HostError as error:
            log.warning("%s: PF %s: %s cannot be read: %s", name, pf.name, status, error)
