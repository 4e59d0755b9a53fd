"""The test kit for plugin authors: a vfio-user client in plain Python and what a VMM builds on it.

It shares no code with the server's C half; it must not be imported by the server.
"""

from vfu_server.testing.client import QEMU_CAPABILITIES, Client, DeviceInfo, Version, dirty_pages
from vfu_server.testing.wire import (
    Connection,
    ConnectionClosedError,
    Memory,
    Message,
    ProtocolError,
    ReplyError,
    pack_message,
)

__all__ = [
    "QEMU_CAPABILITIES",
    "Client",
    "Connection",
    "ConnectionClosedError",
    "DeviceInfo",
    "Memory",
    "Message",
    "ProtocolError",
    "ReplyError",
    "Version",
    "dirty_pages",
    "pack_message",
]
