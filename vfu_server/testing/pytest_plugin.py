"""Fixtures for plugin authors, known to pytest as soon as vfu-server is installed (entry point `pytest11`).

    vfu_fake_host       a door to registers of your tables and nothing else
    vfu_model           a model as a process of its own
    vfu_serve           a device of your plugin, served in this process; `device` of it fails on order
    vfu_guest           a guest with memory and interrupts at a device that is served
    vfu_pair            two devices of your plugin with a guest each, to migrate between

What is asked for is made when it is asked for and ended with the test.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vfu_server.device import ModelCommand
    from vfu_server.host_device import Identity
    from vfu_server.regmap import Block
    from vfu_server.testing.fake_host import FakeHost
    from vfu_server.testing.guest import Guest
    from vfu_server.testing.models import ModelProcess
    from vfu_server.testing.serving import Loop, Served


@dataclass(frozen=True, slots=True)
class Pair:
    """Two guests at two devices: `source` has started, `destination` waits for a state."""

    source: "Guest"
    destination: "Guest"
    served: "tuple[Served, Served]"
    models: "tuple[ModelProcess, ModelProcess]"


@pytest.fixture
def vfu_stack() -> "Iterator[ExitStack]":
    """What ends with the test, last first."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def vfu_fake_host() -> "Callable[..., FakeHost]":
    """`vfu_fake_host(block, ...)` or `vfu_fake_host({bar: block}, ...)`: a FakeHost."""

    def make(blocks: "Block | Mapping[int, Block]", identity: "Identity | None" = None, **more: Any) -> "FakeHost":
        from vfu_server.testing.fake_host import FakeHost

        return FakeHost(blocks if isinstance(blocks, Mapping) else {0: blocks}, identity=identity, **more)

    return make


@pytest.fixture
def vfu_model(vfu_stack: ExitStack) -> "Callable[..., ModelProcess]":
    """`vfu_model("acme_copy.model", *args)` starts `python -m acme_copy.model *args`; also takes a ModelCommand."""

    def start(module: "str | ModelCommand", *args: str, time_scale: float = 0.01) -> "ModelProcess":
        from vfu_server.device import ModelCommand
        from vfu_server.testing.models import ModelProcess

        command = ModelCommand(module, "", args) if isinstance(module, str) else module
        return vfu_stack.enter_context(ModelProcess(command, time_scale=time_scale))

    return start


@pytest.fixture
def vfu_loop(vfu_stack: ExitStack) -> "Callable[[], Loop]":
    """The loop that served devices live in, made when it is first asked for."""
    made: list[Loop] = []

    def loop() -> "Loop":
        from vfu_server.testing.serving import Loop

        if not made:
            made.append(vfu_stack.enter_context(Loop()))
        return made[0]

    return loop


@pytest.fixture
def vfu_serve(vfu_stack: ExitStack, vfu_loop: "Callable[[], Loop]") -> "Callable[..., Served]":
    """`vfu_serve(plugin, model, ...)`: a Served. `plugin`: an installed one's name, or a module or probe of yours.

    `model`: a ModelProcess, or the path of a socket. Further arguments are those of Served.
    """

    def serve(plugin: Any, model: "ModelProcess | str", **more: Any) -> "Served":
        from vfu_server.testing.serving import Served

        path = model if isinstance(model, str) else model.path
        probe = getattr(plugin, "vfu_server_probe", plugin)
        return vfu_stack.enter_context(Served(vfu_loop(), probe, path, **more))

    return serve


@pytest.fixture
def vfu_guest(vfu_stack: ExitStack) -> "Callable[..., Guest]":
    """`vfu_guest(served)`: a Guest that has started; `start=False`: one that waits for a migration."""

    def enter(served: "Served", *, start: bool = True, memory: int = 16 << 20) -> "Guest":
        from vfu_server.testing.guest import Guest
        from vfu_server.testing.memory import GuestMemory

        ram = vfu_stack.enter_context(GuestMemory.of(memory))
        guest = vfu_stack.enter_context(Guest(served.connect_raw(), ram))
        if start:
            return guest.start()
        guest.plug_in()
        guest.machine_reset()
        return guest

    return enter


@pytest.fixture
def vfu_pair(
    vfu_model: "Callable[..., ModelProcess]",
    vfu_serve: "Callable[..., Served]",
    vfu_guest: "Callable[..., Guest]",
) -> Callable[..., Pair]:
    """`vfu_pair(plugin, module, *args)`: two models, two devices of the plugin, two guests. Then `migrate_guest`."""

    def pair(plugin: Any, module: "str | ModelCommand", *args: str) -> Pair:
        models = vfu_model(module, *args), vfu_model(module, *args)
        served = vfu_serve(plugin, models[0], name="source"), vfu_serve(plugin, models[1], name="destination")
        return Pair(vfu_guest(served[0]), vfu_guest(served[1], start=False), served, models)

    return pair
