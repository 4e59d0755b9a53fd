"""`vfu-model NAME ...`: runs a model that an installed plugin ships, alone, for any vfio-user client."""

import runpy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from vfu_server.errors import UsageError, VfuServerError
from vfu_server.logs import plain

if TYPE_CHECKING:
    from vfu_server.device import ModelCommand
    from vfu_server.plugins import Plugin

USAGE = """\
usage: vfu-model NAME --socket-path PATH [options]
  NAME as the plugin calls its model, or PLUGIN/NAME where two plugins have one of that name;
  vfu-model NAME --help shows the options of a model. A VMM can be connected to PATH without vfu-server:
  the device works, and cannot be migrated."""


def installed_models() -> "tuple[dict[str, list[tuple[Plugin, ModelCommand]]], list[str]]":
    """All models of all installed plugins, by name, and why a plugin could not be asked."""
    from vfu_server.plugins import Plugin, Plugins

    plugins, broken = Plugins(), []
    found: dict[str, list[tuple[Plugin, ModelCommand]]] = {}
    for plugin in plugins.load_all():
        if not isinstance(plugin, Plugin):
            broken.append(plugin.reason)
            continue
        try:
            for name, owners in plugins.models(plugin.name).items():
                found.setdefault(name, []).extend(owners)
        except VfuServerError as error:
            broken.append(str(error))
    return found, broken


def command_of(name: str) -> "ModelCommand":
    """The one model called `name`. Raises UsageError, with the models that there are."""
    models, broken = installed_models()
    plugin, slash, model = name.rpartition("/")
    owners = [(owner, command) for owner, command in models.get(model, []) if not slash or owner.name == plugin]
    if len(owners) == 1:
        return owners[0][1]
    if owners:
        names = " and ".join(f"{owner.name}/{model}" for owner, _ in owners)
        raise UsageError(f"two plugins have a model {model!r}: say {names}")
    missing = UsageError(f"there is no model {name!r}" if name else "no model is named")
    for known, each in sorted(models.items()):
        missing.add_note(f"{known:<12} {each[0][1].summary}")
    for reason in broken or ([] if models else ["no installed plugin ships a model"]):
        missing.add_note(reason)
    raise missing


def run(argv: Sequence[str]) -> None:
    """Become the named model's own program, with the rest of the arguments."""
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    try:
        command = command_of(name)
    except VfuServerError as error:
        notes = "".join(f"  {plain(note)}\n" for note in getattr(error, "__notes__", []))
        if argv[:1] in (["--help"], ["-h"]):
            sys.stdout.write(f"{USAGE}\nmodels:\n{notes}")
            sys.exit(0)
        sys.stderr.write(f"vfu-model: error: {plain(str(error))}; models:\n{notes}{USAGE}\n")
        sys.exit(2)
    sys.argv = [command.module, *command.args, *argv[1:]]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


def main() -> NoReturn:
    """Entry point of `vfu-model`."""
    run(sys.argv[1:])
    sys.exit(0)


if __name__ == "__main__":
    main()
