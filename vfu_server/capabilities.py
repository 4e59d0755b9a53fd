"""What `--print-capabilities` says to management software, in the manner of the vhost-user backend conventions.

It must not load a plugin: it is asked of a machine that has no device and perhaps a broken plugin.
"""

from vfu_server import __version__, plugins_installed

# Each name is a promise to management software: it stays once it was released.
FEATURES = (
    "socket-path",
    "fd",
    "socket-group",
    "socket-activation",
    "several-devices",
    "device-socket",
    "model",
    "mmap-never",
    "migrate-stop-copy",
    "migrate-precopy",
    "dma-logging",
    "require-migration",
    "revoke",
    "metrics",
    "trace-regions",
)


def capabilities() -> dict[str, object]:
    """The object to print. `features` and `type` as in the conventions; `plugins` is ours."""
    return {
        "type": "vfio-user",
        "features": list(FEATURES),
        "version": __version__,
        "plugins": sorted({entry.name for entry in plugins_installed.find_all()}),
    }
