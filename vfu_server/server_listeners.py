"""Which socket each device's clients come to: its own path, an fd it was told, or one that systemd opened.

It must not know how sockets are made (`sockets` does) nor what is served. All or none: a failure closes what was
opened before.
"""

import os
from collections.abc import MutableMapping, Sequence

from vfu_server import sockets
from vfu_server.config import DeviceConfig, ServerConfig
from vfu_server.exit_codes import SocketError
from vfu_server.sockets import Activated, Listener


def open_listeners(config: ServerConfig, environ: MutableMapping[str, str]) -> list[Listener]:
    """One listener for each device, in order. Raises SocketError."""
    told = {device.fd for device in config.devices}
    inherited = [socket for socket in sockets.activated(environ) if socket.fd not in told]
    assigned = _assign(config.devices, inherited)
    opened: list[Listener] = []
    try:
        for number, device in enumerate(config.devices):
            opened.append(_open(device, assigned.get(number), config.socket_group, environ))
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def _open(device: DeviceConfig, inherited: Activated | None, group: str, environ: MutableMapping[str, str]) -> Listener:
    if device.fd >= 0:
        return sockets.adopt(device.fd, f"--fd {device.fd}")
    if inherited is not None:
        return sockets.adopt(inherited.fd, inherited.path or f"fd {inherited.fd} from systemd")
    if device.socket_path:
        return sockets.listen(device.socket_path, group)
    directory = sockets.default_directory(environ)
    sockets.make_default_directory(directory)
    return sockets.listen(str(directory / f"{device.name}.sock"), group)


def _assign(devices: Sequence[DeviceConfig], inherited: Sequence[Activated]) -> dict[int, Activated]:
    """Device number -> socket of systemd's: by path, by FileDescriptorName=, or, if as many are left, in order."""
    assigned: dict[int, Activated] = {}
    left = list(inherited)
    open_numbers = [number for number, device in enumerate(devices) if device.fd < 0]
    for number in open_numbers:
        path, name = devices[number].socket_path, devices[number].name
        for socket in left:
            same_path = bool(path) and os.path.abspath(path) == socket.path  # noqa: PTH100 - text only: links stay
            if same_path or (not path and socket.name == name):
                assigned[number] = socket
                left.remove(socket)
                break
    waiting = [number for number in open_numbers if number not in assigned and not devices[number].socket_path]
    if left and len(left) == len(waiting):
        assigned.update(zip(waiting, left, strict=True))
    elif left:
        strays = ", ".join(socket.path or f"fd {socket.fd}" for socket in left)
        raise SocketError(
            f"systemd opened sockets that belong to no device here: {strays}; "
            "name them after the devices with FileDescriptorName=, or give the devices their paths"
        )
    return assigned
