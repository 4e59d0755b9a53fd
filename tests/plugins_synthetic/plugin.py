"""The synthetic device as an installed plugin. It takes any device; its model is edu's, whose registers it hides."""

from pathlib import Path

from tests.plugins_synthetic.device import Shape, SyntheticDevice
from tests.server.programs import install
from vfu_server.device import ModelCommand
from vfu_server.hookspecs import hookimpl

VFU_SERVER_API = 1


@hookimpl
def vfu_server_probe(host, options):
    return SyntheticDevice(host, Shape.parse(options))


@hookimpl
def vfu_server_models():
    return {"synthetic": ModelCommand("plugins.generic_dmaq.models", "edu as a carrier", ("edu",))}


def install_synthetic(folder: Path) -> Path:
    """Make the plugin known by the name `synthetic`; returns the folder for PYTHONPATH."""
    return install(folder, "synthetic_plugin", {}, plugins={"synthetic": __name__})


def options(**shape: float) -> list[str]:
    """The command line of a server with such a device, but for its socket."""
    chosen = [word for name, value in shape.items() for word in ("--option", f"{name}={float(value)!r}")]
    return ["--plugin", "synthetic", "--model", "synthetic", *chosen]
