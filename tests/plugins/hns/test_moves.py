"""A VF under load between two real servers: every entry exactly once, and refusals before the guest stands still."""

from contextlib import ExitStack

from tests.plugins.hns.served import arrival, at_work
from vfu_server.testing import migrate_guest
from vfu_server.uapi import MigState


def test_there_and_back_under_load(pair):
    source, target = pair
    with ExitStack() as stack:
        here, traffic = at_work(stack, source)
        traffic.run_entries(50)
        for server in (target, source, target):
            traffic.submit()
            there = stack.enter_context(arrival(server))
            migrate_guest(here, there)
            here.close()
            traffic.move(there, there.interrupts)
            traffic.run_entries(50)
            here = there
        counts = traffic.finish()
        assert counts.submitted == counts.completed
        traffic.driver.stop()
