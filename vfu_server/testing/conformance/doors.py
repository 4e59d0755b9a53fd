"""A door before a plugin's door: keeps the plugin's calls, fails one of them on order, or loses writes to BARs."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from vfu_server.host_device import HostDevice
from vfu_server.testing.failing import Call
from vfu_server.uapi import RegionIndex

ACCESSES = frozenset({"read", "write", "read_block", "write_block", "write_wide"})
COROUTINES = frozenset({"reset", "device_feature", "set_irqs", "dma_map", "dma_unmap"})


class WatchedHost:
    """Passes everything on to `inner`. What the session does goes by the door itself and is not seen here."""

    def __init__(self, inner: HostDevice) -> None:
        self._inner = inner
        self.calls: list[Call] = []
        self.orders: dict[Call, Exception] = {}
        self.struck: list[Call] = []
        self.lossy = False
        """Writes to BARs are lost."""
        self.lost = 0
        self._counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name in ACCESSES:
            return self._access(name, found)
        return self._coroutine(name, found) if name in COROUTINES else found

    def _access(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def access(region: int, offset: int, *rest: Any) -> Any:
            self._called(name)
            if self.lossy and name.startswith("write") and region != RegionIndex.CONFIG:
                self.lost += 1
                return None
            return call(region, offset, *rest)

        return access

    def _coroutine(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        async def coroutine(*arguments: Any, **named: Any) -> Any:
            self._called(name)
            return await call(*arguments, **named)

        return coroutine

    def _called(self, method: str) -> None:
        self._counts[method] += 1
        call = Call(method, self._counts[method])
        self.calls.append(call)
        if (error := self.orders.pop(call, None)) is not None:
            self.struck.append(call)
            raise error

    def order(self, method: str, error: Exception, nth: int) -> None:
        """Let the `nth` call of `method` from now on raise."""
        self.orders[Call(method, self._counts[method] + nth)] = error
