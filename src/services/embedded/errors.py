"""What can go wrong with a server that this program starts itself.

EmbeddedServerError
├── ServerNotInstalled    its program is not on this machine; the message says what to install
├── ServerStartFailed     it was started and died, or did not become ready; the message ends with its log
└── ServerNotRunning      it was asked for something that only a running server can do
"""

from __future__ import annotations


class EmbeddedServerError(Exception):
    """A server that this program starts itself has a problem."""


class ServerNotInstalled(EmbeddedServerError):
    """The server's program was not found; the message says what to install."""


class ServerStartFailed(EmbeddedServerError):
    """The server died at start or did not become ready in time."""


class ServerNotRunning(EmbeddedServerError):
    """The server is not running; start it first."""
