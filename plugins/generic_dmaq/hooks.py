"""The Python hook beside a profile, for what a table cannot say about a device's state: its base class, and finding it.

A hook handles registers and memory of one device through its bench. It must not know streams, policy or the client.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from plugins.generic_dmaq.bench import Bench
from plugins.generic_dmaq.form import Profile
from vfu_server.errors import ConfigError
from vfu_server.regmap import Register


class Hooks:
    """Does nothing: right for a profile whose table says everything.

    All methods are called with the device at rest, memory space enabled, and interrupts masked in restores. What they
    wait for must have a deadline (`bench.wait_empty` has one).
    """

    memory_size = 0
    """Bytes of memory inside the device that travel; 0: there is none."""
    borrowed: tuple[str, ...] = ()
    """Registers that `save_memory` changes; they are restored after it, with the values of the save."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def problem(self, values: Mapping[str, int]) -> str:
        """Why these register values cannot be restored, for a reader; empty if they can. Called at save and at load.

        The values are those of all saved registers, each within its width, from a stream that may be hostile.
        """
        return ""

    async def save_memory(self) -> bytes | None:
        """The device's inner memory, `memory_size` bytes; None: it cannot be read here (say why in the log)."""
        return None

    async def restore_memory(self, memory: bytes) -> bool:
        """Write the inner memory and make sure. False: it cannot be written. RestoreError: it was not taken."""
        return False

    async def can_restore_memory(self) -> bool:
        """Whether `restore_memory` would work here; touches no register."""
        return False

    async def restore(self, register: Register, value: int, values: Mapping[str, int]) -> None:
        """Bring back a register whose transform is `hook`, in its turn; `values` are all saved ones."""

    async def restore_begin(self, values: Mapping[str, int]) -> None:
        """Before the first register of a whole restore."""

    def counters(self) -> Mapping[str, int]:
        """What the hook counted, for the device's statistics."""
        return {}


def hooks_of(profile: Profile) -> type[Hooks]:
    """The class that the profile names. ConfigError if it is not there or no such class.

    `file.py:Class` is a file beside the profile's, `package.module:Class` a module.
    """
    if not profile.hooks:
        return Hooks
    place, _, name = profile.hooks.partition(":")
    try:
        if place.endswith(".py"):
            path = Path(profile.file).with_name(place)
            spec = importlib.util.spec_from_file_location(f"generic_dmaq_hooks_{path.stem}", path)
            if spec is None or spec.loader is None:
                raise ConfigError(f"{profile.file}: hooks: {path} cannot be loaded")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(f"{profile.file}: hooks: {place} cannot be loaded: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Hooks)):
        raise ConfigError(f"{profile.file}: hooks: {place} has no class {name} derived from {__name__}.Hooks")
    return found
