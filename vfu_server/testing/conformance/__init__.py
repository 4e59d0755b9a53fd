"""The conformance suite: what every plugin must do, checked on a device of its own, its model or one behind a socket.

    records      checks, verdicts, results          bench        two served devices and what checks do with them
    declared     declarations, policy, sources      states       the state machine, stops, clients that vanish
    saved        saves, loads, restores             hostile      streams that nobody should take
    faults       failures at each call              accesses     reads and writes of all kinds in all states
    pace         how long the event loop was held

It judges plugins, not the server: what it finds wrong is the plugin's to mend.
"""

from vfu_server.testing.conformance.bench import Bench, Target
from vfu_server.testing.conformance.records import CHECKS, Check, Result, Verdict
from vfu_server.testing.conformance.suite import run

__all__ = ["CHECKS", "Bench", "Check", "Result", "Target", "Verdict", "run"]
