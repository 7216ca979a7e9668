"""The one question that the rest of the program asks: where is everything?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from toolfleet.services.discovery.models import McpServer


class Registry(Protocol):
    """Where NATS, Redis and the MCP servers are now. Ask again to learn of a change.

    Every method but `close` raises `DiscoveryError` where the registry cannot be used, and its subclass
    `ServiceNotFound` where it can and has no such service. The messages say what to set and show no credentials.
    """

    async def nats_urls(self) -> list[str]:
        """URLs of the NATS servers, at least one; may contain credentials."""
        ...

    async def redis_url(self) -> str:
        """The URL of the Redis server; may contain credentials."""
        ...

    async def mcp_servers(self) -> list[McpServer]:
        """The MCP servers, names unique; an empty list where there are none."""
        ...

    async def queue_meta(self) -> Mapping[str, str]:
        """What the NATS service says about the queue: `stream` and `subject_prefix`, each where it is given."""
        ...

    async def close(self) -> None:
        """Gives up connections. Safe to repeat."""
        ...
