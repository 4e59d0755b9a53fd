"""Every fault that crosses a room, by whose fault it is; each carries the errno that the client is answered.

Errors know nothing of sockets, devices or logs. Context is added with `add_note` on the way up.
"""

import errno as _errno


class VfuServerError(Exception):
    """Base of all faults. `errno` is a positive Linux errno, the one that goes into a reply."""

    default_errno = _errno.EIO

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = self.default_errno if errno is None else errno


class UsageError(VfuServerError):
    """The operator asked for something that cannot be; the message names the cause and the way out."""

    default_errno = _errno.EINVAL


class ConfigError(UsageError):
    """A configuration file or device profile is wrong; the message names file, line and field."""


class ClientError(VfuServerError):
    """The client broke the protocol or the device's rules: it is answered, counted and served on."""

    default_errno = _errno.EINVAL


class HostError(VfuServerError):
    """The kernel, the hardware or the device's own server refused or failed."""


class DeviceGoneError(HostError):
    """The device behind the door is gone for good (unplugged, its server died)."""

    default_errno = _errno.ENODEV


class PluginError(VfuServerError):
    """A plugin broke its contract (wrong declaration, unexpected exception)."""


class DeadlineError(VfuServerError):
    """Something did not happen in time; the message says what was waited for and what was seen last."""

    default_errno = _errno.ETIMEDOUT


class MigrationError(VfuServerError):
    """Base of what can go wrong with a device's state."""

    default_errno = _errno.EINVAL


class StateError(MigrationError):
    """A migration state was asked for that cannot be reached from the present one."""


class StateLostError(MigrationError):
    """What the device does now is unknown, or its driver has given it up: state ERROR, left by a reset only."""

    default_errno = _errno.EIO


class StreamFormatError(MigrationError):
    """The bytes are no stream of ours: wrong magic, version, order, length or checksum, cut short or too long."""


class StreamMismatchError(MigrationError):
    """A sound stream, but of another plugin, device, revision or firmware than the one it is loaded into."""


class RestoreError(MigrationError):
    """The hardware did not take the state: what was read back differs from what was written."""

    default_errno = _errno.EIO
