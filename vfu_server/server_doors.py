"""Opening the door to a device by its address, and finding out what another address means for a device.

It must not know plugins or who uses the door.
"""

import os
import re
from pathlib import Path

from vfu_server import config
from vfu_server.config import DeviceConfig, Source, SourceKind
from vfu_server.errors import HostError, UsageError
from vfu_server.host_device import HostDevice

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
PHYSICAL_FUNCTION = "pf"
ROOT = Path("/")


async def open_host(source: Source, device: DeviceConfig) -> HostDevice:
    """Open the door to a device. Raises HostError, UsageError."""
    try:
        if source.kind is SourceKind.BDF:
            from vfu_server.host.kernel import open_bdf

            fds = device.vfio_fd, device.iommufd
            return await open_bdf(source.value, vf_token=device.vf_token, vfio_fd=fds[0], iommu_fd=fds[1])
        if source.kind is SourceKind.MDEV:
            from vfu_server.host.kernel import open_mdev

            return await open_mdev(source.value)
        from vfu_server.host.vfio_user import VfioUserHost

        return await VfioUserHost.open(source.value, device.name)
    except OSError as error:
        raise HostError(f"{source} cannot be opened: {error.strerror}", error.errno) from error


def companion_source(where: str, own: Source, root: Path = ROOT) -> Source:
    """What `where` means for a device at `own` (see `Companions.open`). Raises HostError. `root`: as of `Sysfs`."""
    if "/" in where:
        found = Source(SourceKind.DEVICE_SOCKET, os.path.abspath(where))  # noqa: PTH100 - text only: links stay
    elif _WORD.fullmatch(where):
        found = _beside(where, own, root)
    else:
        try:
            found = config.source(SourceKind.BDF, where)
        except UsageError as error:
            raise HostError(f"companion {where!r}: it is no PCI address, path of a socket or word") from error
    if found == own:
        raise HostError(f"companion {where}: that is the device itself")
    return found


def companion_token(where: Source, own: Source, vf_token: str, root: Path = ROOT) -> str:
    """The token for opening `where` beside `own`: the VF's, for its PF; none for anything else."""
    if not vf_token or where.kind is not SourceKind.BDF or own.kind is not SourceKind.BDF:
        return ""
    return vf_token if _parent(own.value, root) == where.value else ""


def _beside(word: str, own: Source, root: Path) -> Source:
    if own.kind is SourceKind.DEVICE_SOCKET:
        return Source(SourceKind.DEVICE_SOCKET, f"{os.path.abspath(own.value)}.{word}")  # noqa: PTH100
    if own.kind is SourceKind.BDF and word == PHYSICAL_FUNCTION:
        if parent := _parent(own.value, root):
            return Source(SourceKind.BDF, parent)
        raise HostError(f"companion {word}: {own.value} is no virtual function, so it has none")
    raise HostError(f"companion {word}: {own} has none of that name; give a PCI address or the path of a socket")


def _parent(bdf: str, root: Path) -> str:
    """The PF that a VF belongs to; empty if it is none."""
    from vfu_server.host.sysfs import Sysfs

    return Sysfs(root).function(bdf).physical_function
