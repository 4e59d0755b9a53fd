"""`python -m vfu_server.model_server NAME ...`: runs a model that an installed plugin ships under that name."""

import runpy
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pluggy

from vfu_server import hookspecs

if TYPE_CHECKING:
    from vfu_server.device import ModelCommand


def installed_models() -> "dict[str, ModelCommand]":
    """All models of all installed plugins, by name."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.load_setuptools_entrypoints(hookspecs.PROJECT)
    answers: list[Mapping[str, ModelCommand]] = manager.hook.vfu_server_models()
    return {name: command for answer in reversed(answers) for name, command in answer.items()}


def run(argv: list[str]) -> None:
    """Become the named model's own program, with the rest of the arguments."""
    models = installed_models()
    if not argv or argv[0] not in models:
        known = "\n".join(f"  {name:<12} {command.summary}" for name, command in sorted(models.items()))
        what = f"there is no model {argv[0]!r}" if argv else "usage: NAME --socket-path PATH"
        sys.exit(f"{what}; models:\n{known}" if known else f"{what}; no installed plugin ships one")
    command = models[argv[0]]
    sys.argv = [command.module, *command.args, *argv[1:]]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(sys.argv[1:])
