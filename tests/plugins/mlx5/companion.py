"""Companions as a device is given them, without a server: one host, one task that drives it."""

from contextlib import asynccontextmanager

import trio

from vfu_server.errors import HostError


class OneCompanion:
    """Companions that open one host, as the server does, without doors: `serve` runs in `nursery`."""

    def __init__(self, host, nursery):
        self.host = host
        self.nursery = nursery
        self.error: HostError | None = None
        self.asked = []

    def open(self, where, serve):
        @asynccontextmanager
        async def opened():
            self.asked.append(where)
            if self.error is not None:
                raise self.error
            ended = trio.Event()
            scope = trio.CancelScope()

            async def run(task_status):
                with scope:
                    try:
                        await serve(self.host, task_status)
                    finally:
                        ended.set()

            value = await self.nursery.start(run)
            try:
                yield value
            finally:
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await ended.wait()

        return opened()
