"""The test kit for plugin authors: a vfio-user client in plain Python and what a VMM builds on it.

It shares no code with the server's C half; it must not be imported by the server.

    wire         whole messages, fds, ids, deadlines
    client       every command as a method, as strict as QEMU
    memory       guest RAM          interrupts   eventfds          pci   config space as firmware walks it
    guest        all of it in QEMU's order
    migrate      moving a device between two servers
    edu          a guest's driver for the edu device
    models       a software model as a process   fake_host   a door made of register tables
    failing      a device that fails on order

Of the server's own parts, and imported from where they are: `serving` (a plugin's device served in this process),
`conformance` (the suite of `vfu-plugin check`), `pytest_plugin` (fixtures).
"""

from vfu_server.testing.client import QEMU_CAPABILITIES, Client, DeviceInfo, Version, dirty_pages
from vfu_server.testing.edu import EduDriver
from vfu_server.testing.failing import FailingDevice
from vfu_server.testing.fake_host import FakeHost
from vfu_server.testing.guest import Guest
from vfu_server.testing.interrupts import Interrupts
from vfu_server.testing.memory import GuestMemory
from vfu_server.testing.migrate import (
    MigrationRecord,
    Progress,
    Step,
    VmmPart,
    load,
    migrate,
    migrate_guest,
    save,
    save_early,
)
from vfu_server.testing.models import ModelProcess
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
    "EduDriver",
    "FailingDevice",
    "FakeHost",
    "Guest",
    "GuestMemory",
    "Interrupts",
    "Memory",
    "Message",
    "MigrationRecord",
    "ModelProcess",
    "Progress",
    "ProtocolError",
    "ReplyError",
    "Step",
    "Version",
    "VmmPart",
    "dirty_pages",
    "load",
    "migrate",
    "migrate_guest",
    "pack_message",
    "save",
    "save_early",
]
