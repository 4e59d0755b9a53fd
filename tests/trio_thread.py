"""A trio loop in a thread of the test's process, so that a test may speak to what runs there as a client would.

It must not know what is run: a subclass says that in `_serve`.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import trio

STALL = 60.0
"""Seconds that a busy machine may take over what is done at once."""


class TrioThread:
    """Runs `_serve` until `close`; what fails there is raised in the test."""

    def __init__(self, name: str) -> None:
        self._scope = trio.CancelScope()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._token: trio.lowlevel.TrioToken
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Begin, and wait until `_serving` was called. Raises what kept it from that."""
        self._thread.start()
        assert self._ready.wait(STALL)
        if self._failure is not None:
            raise self._failure

    async def _serve(self) -> None:
        """What the thread is for: calls `_serving` when clients may come, and ends when `_scope` is cancelled."""
        raise AssertionError("a subclass says what is served")

    def _serving(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ready.set()

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._failure = error
        finally:
            self._ready.set()

    def on_trio(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the loop's thread and wait for it."""
        return trio.from_thread.run_sync(call, *arguments, trio_token=self._token)

    def close(self) -> None:
        """End it, and raise what had failed."""
        if self._thread.is_alive():
            with contextlib.suppress(trio.RunFinishedError):
                self.on_trio(self._scope.cancel)
        self._thread.join(STALL)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure
