"""The MCP servers of the fleet as the registry names them, each with the way to it.

This module is light: the MCP SDK (0.7 s and 40 MB to import) comes in with the first link.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, Final

from toolfleet.services.background_jobs.errors import ToolUnavailable
from toolfleet.services.discovery.models import McpServer
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
        registry: asked again beside the calls, at most once a second; a call waits for it only where it names no
            server that is known. What it said last serves while it can't be used.
        settings: bounds of the sessions.
    """

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._servers: dict[str, McpServer] | None = None
        self._read_at = 0.0
        self._reading: asyncio.Task[None] | None = None
        self._links: dict[str, ServerLink] = {}
        self._leaving: list[ServerLink] = []

    async def names(self) -> list[str]:
        """The servers that the registry names now.

        Raises:
            ToolUnavailable: the registry can't be used and never could.
        """
        await self._read()
        return sorted(self._servers or ())

    async def link(self, name: str) -> ServerLink:
        """The way to a server.

        Raises:
            ToolUnavailable: the registry names no such server now, or can't be used.
        """
        old = time.monotonic() - self._read_at > _REGISTRY_AGE_S
        if name not in self._links and (old or self._servers is None):
            await self._read()
        elif old:
            self._start_reading()
        link = self._links.get(name)
        if link is not None:
            return link
        servers = self._servers or {}
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
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})
        links = [*self._links.values(), *self._leaving]
        self._links.clear()
        self._leaving.clear()
        await asyncio.gather(*(link.close() for link in links))

    async def _read(self) -> None:
        """Ask the registry; callers that come meanwhile share the answer.

        Raises:
            ToolUnavailable: it can't be used and never could.
        """
        task = self._start_reading()
        await asyncio.wait({task})
        if self._servers is None and not task.cancelled() and (error := task.exception()) is not None:
            raise ToolUnavailable(f"the MCP servers are not known: {error}") from error

    def _start_reading(self) -> asyncio.Task[None]:
        if self._reading is None:
            self._reading = asyncio.create_task(self._ask(), name="mcp-servers-from-registry")
            self._reading.add_done_callback(self._asked)
        return self._reading

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._reading = None
        self._read_at = time.monotonic()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("the registry can't be used, its last answer about MCP servers serves: %s", error)

    async def _ask(self) -> None:
        servers = {server.name: server for server in await self._registry.mcp_servers()}
        self._servers = servers
        self._leaving = [link for link in self._leaving if not link.idle]
        for name, link in list(self._links.items()):
            if servers.get(name) != link.server:
                del self._links[name]
                link.leave()
                self._leaving.append(link)


def _new_link(server: McpServer, settings: Settings) -> ServerLink:
    from toolfleet.services.tool_execution.server_link import ServerLink  # heavy, see the module's docstring

    return ServerLink(server, settings)
