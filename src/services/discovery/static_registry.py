"""The registry of explicit settings: NATS_URL, REDIS_URL and the MCP servers' file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import urlsplit

from toolfleet.services.discovery.mcp_config import load_mcp_config
from toolfleet.services.discovery.models import DiscoveryError, McpServer, ServiceNotFound
from toolfleet.settings import Settings

_NATS_SCHEMES = frozenset({"nats", "tls", "ws", "wss"})
_REDIS_SCHEMES = frozenset({"redis", "rediss", "unix"})


class StaticRegistry:
    """Answers from settings alone."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def nats_urls(self) -> list[str]:
        """NATS_URL, split at its commas.

        Raises:
            ServiceNotFound: it is not set.
            DiscoveryError: an entry is no NATS URL.
        """
        if self._settings.nats_url is None:
            raise ServiceNotFound("NATS_URL is not set; set it to nats://host:port")
        urls = [url.strip() for url in self._settings.nats_url.get_secret_value().split(",") if url.strip()]
        if not urls:
            raise DiscoveryError("NATS_URL is empty; set it to nats://host:port, several separated by commas")
        return [_checked(url, "NATS_URL", _NATS_SCHEMES) for url in urls]

    async def redis_url(self) -> str:
        """REDIS_URL.

        Raises:
            ServiceNotFound: it is not set.
            DiscoveryError: it is no Redis URL.
        """
        if self._settings.redis_url is None:
            raise ServiceNotFound("REDIS_URL is not set; set it to redis://host:port/0")
        return _checked(self._settings.redis_url.get_secret_value().strip(), "REDIS_URL", _REDIS_SCHEMES)

    async def mcp_servers(self) -> list[McpServer]:
        """The servers of TOOLFLEET_MCP_CONFIG, in the file's order, read anew at every call; none where it is unset.

        Raises:
            DiscoveryError: the file cannot be read or is not in the `mcpServers` form.
        """
        if self._settings.mcp_config is None:
            return []
        variables = {name: value.get_secret_value() for name, value in self._settings.mcp_variables.items()}
        return await asyncio.to_thread(load_mcp_config, self._settings.mcp_config, variables)

    async def queue_meta(self) -> Mapping[str, str]:
        """Nothing: settings name the stream themselves."""
        return {}

    async def close(self) -> None:
        """Holds nothing."""


def _checked(url: str, variable: str, schemes: frozenset[str]) -> str:
    # The URL itself stays out of the messages: it may contain a password.
    wanted = " or ".join(f"{scheme}://" for scheme in sorted(schemes))
    try:
        parts = urlsplit(url)
        complete = bool(parts.path if parts.scheme == "unix" else parts.hostname and parts.port != 0)
    except ValueError:
        raise DiscoveryError(f"{variable} is not a URL (check its host and port); it starts with {wanted}") from None
    if parts.scheme not in schemes:
        raise DiscoveryError(f"{variable} does not start with {wanted}")
    if not complete:
        raise DiscoveryError(f"{variable} names no host")
    return url
