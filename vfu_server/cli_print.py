"""What the informational options print: plugins, policies, versions.

It must not open a device. Slow libraries are imported here, when they are wanted, so that serving need not wait for
them.
"""

import json
import platform
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vfu_server import __version__
from vfu_server.errors import VfuServerError
from vfu_server.hookspecs import API_VERSION
from vfu_server.plugins import BrokenPlugin, Description, Plugin, Plugins

if TYPE_CHECKING:
    from vfu_server.region import MmapMode

_WIDTH_OF_FILES = 200


def print_plugins(plugins: Plugins, form: str) -> None:
    """Each plugin: version, summary, models; a broken one: why."""
    rows = [_plugin_row(plugins, plugin) for plugin in plugins.load_all()]
    if form == "json":
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("no plugin is installed")
    for row in rows:
        print(f"{row['name']} {row['version']} ({row['distribution']})")
        if "error" in row:
            print(f"  broken: {row['error']}")
            continue
        print(f"  {row['summary'] or 'says nothing about itself'}")
        for name, summary in row["models"].items():
            print(f"  --model {name}: {summary}")


def _plugin_row(plugins: Plugins, plugin: Plugin | BrokenPlugin) -> dict[str, Any]:
    row: dict[str, Any] = {"name": plugin.name, "version": plugin.version, "distribution": plugin.distribution}
    if isinstance(plugin, BrokenPlugin):
        return row | {"error": plugin.reason}
    try:
        models = {
            model: command.summary for model, found in plugins.models(plugin.name).items() for _, command in found
        }
        return row | {"summary": plugins.describe(plugin, {}).summary, "models": models}
    except VfuServerError as error:
        return row | {"error": str(error)}


def print_policy(plugins: Plugins, name: str, options: Mapping[str, str], mmap: str, form: str) -> None:
    """The access policy of each kind of device that the plugin (`auto`: every plugin) knows."""
    from vfu_server import region

    mode = region.MmapMode(mmap)
    described = {plugin.name: plugins.describe(plugin, options) for plugin in plugins.select(name)}
    if form == "json":
        print(
            json.dumps(
                {
                    plugin: {
                        variant: region.policy_json(policy, sizes, mode)
                        for variant, (policy, sizes) in description.policies.items()
                    }
                    for plugin, description in described.items()
                },
                indent=2,
            )
        )
        return
    if form == "markdown":
        print("\n".join(policy_page(plugin, description, mode) for plugin, description in described.items()), end="")
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    for plugin, description in described.items():
        console.print(f"{plugin}: {description.summary}", style="bold", markup=False, highlight=False)
        for variant, (policy, sizes) in description.policies.items():
            console.print()
            console.print(region.policy_table(policy, sizes, mode, variant))


def policy_page(plugin: str, description: Description, mode: "MmapMode") -> str:
    """The policies of a plugin as a document, a newline at its end."""
    from vfu_server import region

    option = "" if mode is region.MmapMode.PLUGIN else f" --mmap {mode.value}"
    how = f"`vfu-server --plugin {plugin} --show-policy --format markdown{option}`"
    parts = [
        f"# Access policy of {plugin}",
        f"{description.summary}.",
        f"This page is what {how} prints. A cell without r and w holds for reads and writes.",
    ]
    for variant, (policy, sizes) in description.policies.items():
        parts += [f"## {variant}", region.policy_markdown(policy, sizes, mode).rstrip("\n")]
    return "\n\n".join(parts) + "\n"


def print_versions(plugins: Plugins) -> None:
    """Ours, what we stand on, and the plugins'."""
    import importlib.metadata

    print(f"vfu-server {__version__}")
    print(
        f"  plugin contract {API_VERSION}, Python {platform.python_version()}, "
        f"trio {importlib.metadata.version('trio')}"
    )
    for plugin in plugins.load_all():
        broken = ", broken: see --list-plugins" if isinstance(plugin, BrokenPlugin) else ""
        print(f"  plugin {plugin.name} {plugin.version}{broken}")


def print_capabilities() -> None:
    """For management software."""
    from vfu_server.capabilities import capabilities

    print(json.dumps(capabilities(), indent=2))
