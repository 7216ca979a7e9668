"""What discovery finds, and what it says when it does not.

    DiscoveryError            a configuration or a registry cannot be used; the message says which and what to do
    └── ServiceNotFound       it can, and the service asked for is not there

Credentials stand in URLs, headers, environments and arguments: no message and no `repr` here shows one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit


class DiscoveryError(Exception):
    """The configuration or the registry cannot be used."""


class ServiceNotFound(DiscoveryError):
    """The service is neither configured nor registered with a passing instance."""


@dataclass(frozen=True)
class Endpoint:
    """One passing instance of a service."""

    host: str
    port: int
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def netloc(self) -> str:
        """``host:port``, an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, repr=False)
class McpServer:
    """How one MCP server is reached: by `url` (streamable HTTP), or by `command` (stdio, a child process).

    Raises:
        ValueError: neither or both of `url` and `command`, or a name with which ``server/tool`` would be ambiguous.
    """

    name: str
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError("the name of an MCP server is not empty and has no '/'")
        if (self.url is None) == (self.command is None):
            raise ValueError("an MCP server has either a 'url' or a 'command'")

    @property
    def location(self) -> str:
        """For messages: the command's name, or the URL without credentials and query."""
        if self.url is None:
            return str(self.command)
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def __repr__(self) -> str:
        return f"McpServer({self.name!r}, {self.location})"
