"""The MCP servers of the fleet as the registry names them, each with the way to it.

This module is light: the MCP SDK (0.7 s and 40 MB to import) comes in with the first link.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from toolfleet.services.background_jobs.errors import ToolUnavailable
from toolfleet.services.discovery.models import DiscoveryError, McpServer
from toolfleet.services.discovery.registry import Registry
from toolfleet.settings import Settings

if TYPE_CHECKING:
    from toolfleet.services.tool_execution.server_link import ServerLink

_log = logging.getLogger(__name__)

_REGISTRY_AGE_S: Final = 1.0
"""How long the registry's answer is used again: a burst of calls asks once."""


class McpServers:
    """Links to the servers of a registry, made when they are needed and kept.

    Args:
        registry: asked again at most once a second; what it said last serves while it can't be used.
        settings: bounds of the sessions.
    """

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._servers: dict[str, McpServer] | None = None
        self._read_at = 0.0
        self._reading = asyncio.Lock()
        self._links: dict[str, ServerLink] = {}
        self._leaving: list[ServerLink] = []

    async def names(self) -> list[str]:
        """The servers that the registry names now.

        Raises:
            ToolUnavailable: the registry can't be used and never could.
        """
        return sorted(await self._current())

    async def link(self, name: str) -> ServerLink:
        """The way to a server.

        Raises:
            ToolUnavailable: the registry names no such server now, or can't be used.
        """
        servers = await self._current()
        link = self._links.get(name)
        if link is not None:
            return link
        server = servers.get(name)
        if server is None:
            known = ", ".join(sorted(servers)) or "none"
            raise ToolUnavailable(
                f"no MCP server '{name}' is registered now (there are: {known}); the call was not sent"
            )
        link = self._links[name] = _new_link(server, self._settings)
        return link

    async def list_tools(self, name: str) -> list[dict[str, Any]]:
        """All tools of a server, in the protocol's own form.

        Raises:
            ToolFailure: one of its subclasses.
        """
        link = await self.link(name)
        session = await link.session(self._settings.mcp_connect_timeout)
        return await session.list_tools()

    async def close(self) -> None:
        """End all sessions and child processes. Safe to repeat."""
        links = [*self._links.values(), *self._leaving]
        self._links.clear()
        self._leaving.clear()
        await asyncio.gather(*(link.close() for link in links))

    async def _current(self) -> dict[str, McpServer]:
        async with self._reading:
            if self._servers is None or time.monotonic() - self._read_at > _REGISTRY_AGE_S:
                await self._read()
        assert self._servers is not None
        return self._servers

    async def _read(self) -> None:
        try:
            servers = {server.name: server for server in await self._registry.mcp_servers()}
        except DiscoveryError as error:
            if self._servers is None:
                raise ToolUnavailable(f"the MCP servers are not known: {error}") from error
            _log.warning("the registry can't be used, its last answer about MCP servers serves: %s", error)
            servers = self._servers
        self._servers = servers
        self._read_at = time.monotonic()
        self._leaving = [link for link in self._leaving if not link.idle]
        for name, link in list(self._links.items()):
            if servers.get(name) != link.server:
                del self._links[name]
                link.leave()
                self._leaving.append(link)


def _new_link(server: McpServer, settings: Settings) -> ServerLink:
    from toolfleet.services.tool_execution.server_link import ServerLink  # heavy, see the module's docstring

    return ServerLink(server, settings)
