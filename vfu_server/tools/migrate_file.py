"""A device's state into a file and out of it, as a client of the device's server.

It must not know command lines or how progress is shown. A file is complete or not there; a device that was saved runs
on.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import TypeVar

from vfu_server.testing.client import Client
from vfu_server.testing.migrate import Progress, Step, load, save
from vfu_server.tools.outcome import place_error
from vfu_server.uapi import MigState

Result = TypeVar("Result")
Tell = Callable[[Progress], None]


class Timeline:
    """The steps of one job, each timed, and the bytes so far."""

    def __init__(self, tell: Tell) -> None:
        self.steps: list[Step] = []
        self.bytes = 0
        self._tell = tell
        self._step = "start"
        self._left: int | None = None

    def step(self, name: str, action: Callable[[], Result]) -> Result:
        """Do it; a failure carries the name of its step."""
        self._step = name
        self._tell(Progress(name, self.bytes, 0, self._left))
        begun = time.monotonic()
        try:
            result = action()
        except BaseException as error:
            error.add_note(f"failed in step {name!r}")
            raise
        self.steps.append(Step(name, time.monotonic() - begun))
        return result

    def counted(self, chunks: Iterable[bytes], size: int | None = None) -> Iterator[bytes]:
        """The chunks, counted and told; `size` if it is known how many bytes there will be."""
        for chunk in chunks:
            self.bytes += len(chunk)
            self._left = None if size is None else max(0, size - self.bytes)
            self._tell(Progress(self._step, self.bytes, 0, self._left))
            yield chunk


def save_to_file(client: Client, path: str, tell: Tell) -> Timeline:
    """Stop the device, write its state to `path`, let it run again. On a failure it runs again and there is no file."""
    line = Timeline(tell)
    with _new_file(path) as file:
        try:
            line.step("source STOP_COPY", lambda: client.set_mig_state(MigState.STOP_COPY))
            line.step("data", lambda: _write(file, path, line.counted(save(client))))
            line.step("source RUNNING", lambda: client.set_mig_state(MigState.RUNNING))
        except BaseException as error:
            _run_again(client, error)
            raise
    return line


def load_from_file(client: Client, path: str, tell: Tell) -> Timeline:
    """Give the state in `path` to the device and let it run. On a failure it is reset."""
    line = Timeline(tell)
    with _opened(path) as (chunks, size):
        try:
            line.step("destination RESUMING", lambda: client.set_mig_state(MigState.RESUMING))
            line.step("data", lambda: load(client, line.counted(chunks, size)))
            line.step("destination RUNNING", lambda: client.set_mig_state(MigState.RUNNING))
        except BaseException as error:
            _reset(client, error)
            raise
    return line


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[FileIO]:
    """A file beside `path` that takes its place at the end of the `with`; gone if that is left by an exception."""
    partial = Path(f"{path}.partial")
    try:
        file = partial.open("xb", buffering=0)  # a buffer would fail once more when it is closed
    except OSError as error:
        raise place_error("written", str(partial), error) from error
    try:
        with file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise place_error("written", path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _write(file: FileIO, path: str, chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        view = memoryview(chunk)
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            raise place_error("written", path, error) from error
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise place_error("written", path, error) from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Iterator[bytes], int]]:
    """The file's chunks, as large as a message may carry, and its size."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise place_error("read", path, error) from error

    def chunks() -> Iterator[bytes]:
        while True:
            try:
                chunk = file.read(1 << 20)
            except OSError as error:
                raise place_error("read", path, error) from error
            if not chunk:
                return
            yield chunk

    with file:
        yield chunks(), os.fstat(file.fileno()).st_size


def _run_again(client: Client, error: BaseException) -> None:
    try:
        if client.mig_state() is not MigState.RUNNING:
            client.set_mig_state(MigState.RUNNING)
    except Exception as second:  # noqa: BLE001 - the first failure is the one to raise
        error.add_note(f"the source could not be put back to RUNNING: {second}")
    else:
        error.add_note("the source runs")


def _reset(client: Client, error: BaseException) -> None:
    try:
        client.reset()
    except Exception as second:  # noqa: BLE001 - the first failure is the one to raise
        error.add_note(f"the destination could not be reset: {second}")
    else:
        error.add_note("the destination was reset: it runs, without the state")
