"""A short folder for sockets and files, as the server's tests have it."""

from tests.server.conftest import folder

__all__ = ["folder"]
