"""What the fleet can call: the tools of all servers, cached in Redis and in memory.

A submit is never slowed by a tool server: what is cached decides, and a copy that is too old is refreshed beside it.
Only a name that nobody knows makes a caller wait, once and within a bound, since its server may just have come up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

from toolfleet.services.background_jobs.errors import ToolFailure, ToolUnavailable
from toolfleet.services.background_jobs.ports import ToolSpec
from toolfleet.services.tool_execution.catalogue_store import TTL_S, CatalogueStore, ServerTools, SharedStore
from toolfleet.services.tool_execution.policy import unused_overrides
from toolfleet.services.tool_execution.tool_index import ToolIndex
from toolfleet.settings import Settings

_log = logging.getLogger(__name__)

_LOOK_AGAIN_S: Final = 2.0
"""Least time between two listings that unknown names ask for: a client with a typo must not load the servers."""


class ToolLister(Protocol):
    """The servers, as the catalogue needs them; `McpServers` is one."""

    async def names(self) -> list[str]:
        """The servers that are there now; raises `ToolUnavailable` where that can't be found out."""
        ...

    async def list_tools(self, name: str) -> list[dict[str, Any]]:
        """A server's tools in the protocol's form; raises `ToolFailure`."""
        ...


class CachedCatalogue:
    """A `ToolCatalogue` over the fleet's servers. Made inside the event loop that it is used in.

    Args:
        servers: where the tools come from.
        redis: the copy shared with other processes; None for one in memory only.
        settings: `catalogue_ttl`, `tool_policy`, `mcp_connect_timeout`.
        look_again_s: least seconds between two listings on behalf of unknown names.
    """

    def __init__(
        self, servers: ToolLister, redis: SharedStore | None, settings: Settings, *, look_again_s: float = _LOOK_AGAIN_S
    ) -> None:
        self._servers = servers
        self._store = CatalogueStore(redis)
        self._settings = settings
        self._look_again_s = look_again_s
        self._known: dict[str, ServerTools] = {}
        self._live: frozenset[str] | None = None
        self._index = ToolIndex((), None, settings.tool_policy)
        self._failures: dict[str, str] = {}
        """Why a server could not be listed the last time it was tried."""
        self._told: frozenset[str] = frozenset()
        """What is wrong with the policy, as it was told."""
        self._loaded = False
        self._loading = asyncio.Lock()
        self._refresh_due = 0.0
        self._asked_at = float("-inf")
        self._listed_at: dict[str, float] = {}
        """When each server was last asked, by the monotonic clock."""
        self._refreshing: asyncio.Task[None] | None = None
        self._change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the index changes; then there is another one."""

    @property
    def unreached(self) -> list[str]:
        """Servers that are registered and whose tools have never been seen."""
        return sorted((self._live or frozenset()) - self._known.keys())

    async def find(self, tool_name: str) -> ToolSpec:
        """The spec of a tool, by ``tool`` or ``server/tool``.

        Raises:
            UnknownTool: nobody offers it, or several do; ``details["nearest"]`` lists the nearest names.
            ToolUnavailable: no tool server was ever reached, or the one that is named never was.
        """
        await self._warm()
        return self._settled(tool_name) or await self._look_again(tool_name)

    async def tools(self) -> Sequence[ToolSpec]:
        """All tools of the registered servers, by name; waits for the servers only where nothing is cached."""
        await self._warm()
        if self._index.empty and self._refreshing is not None:
            await asyncio.wait({self._refreshing}, timeout=self._settings.mcp_connect_timeout)
        return self._index.tools

    async def close(self) -> None:
        """End the refresh that may be running. Safe to repeat."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait({self._refreshing})

    async def _warm(self) -> None:
        """Have the shared copy in memory, and a refresh on its way if it is due."""
        if not self._loaded:
            async with self._loading:
                if not self._loaded:
                    await self._load()
                    self._loaded = True
        if time.monotonic() >= self._refresh_due and self._refreshing is None:
            self._start(force=False)

    async def _look_again(self, tool_name: str) -> ToolSpec:
        """Ask the servers once more for a name that is not known, as far as the rate allows."""
        spec = await self._awaited(tool_name)
        if spec is None and time.monotonic() - self._asked_at >= self._look_again_s:
            self._asked_at = time.monotonic()
            self._start(force=True)
            spec = await self._awaited(tool_name)
        if spec is not None:
            return spec
        if not self._known:
            raise ToolUnavailable(f"no tool server has been reached yet{self._reasons()}")
        server, slash, _ = tool_name.partition("/")
        if slash and server in self.unreached:
            raise ToolUnavailable(f"tool server '{server}' has never been reached: {self._failures.get(server)}")
        raise self._index.unknown(tool_name)

    async def _awaited(self, tool_name: str) -> ToolSpec | None:
        """The spec as soon as any server lists it; None when all have answered, or at the bound."""
        deadline = time.monotonic() + self._settings.mcp_connect_timeout
        while True:
            spec = self._settled(tool_name)
            left = deadline - time.monotonic()
            if spec is not None or self._refreshing is None or left <= 0:
                return spec or self._index.get(tool_name)
            await asyncio.wait({self._refreshing, self._change}, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def _settled(self, tool_name: str) -> ToolSpec | None:
        """The spec, unless a server that is being asked for the first time could still make the name ambiguous.

        Raises:
            UnknownTool: it is ambiguous.
        """
        spec = self._index.get(tool_name)
        first_asked = self._refreshing is not None and set(self.unreached) - self._failures.keys()
        return None if first_asked and "/" not in tool_name else spec

    def _start(self, *, force: bool) -> None:
        """Begin a refresh, unless one is running: callers that come meanwhile share it."""
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh(force), name="tool-catalogue-refresh")
            self._refreshing.add_done_callback(self._refreshed)

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshing = None
        self._refresh_due = time.monotonic() + self._settings.catalogue_ttl
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("refreshing the tool catalogue failed", exc_info=error)

    async def _refresh(self, force: bool) -> None:
        """Read the shared copy and the registry again, and list the servers whose copy is too old.

        With `force` those too whose copy is not, as far as the rate allows.
        """
        await self._load()
        try:
            self._live = frozenset(await self._servers.names())
        except ToolUnavailable as error:
            _log.warning("the tool catalogue can't be refreshed, its copy serves: %s", error)
            return
        self._rebuild()
        due = [name for name in self._live if self._is_old(name) or (force and self._may_ask(name))]
        async with asyncio.TaskGroup() as group:
            for name in due:
                group.create_task(self._list(name), name=f"tool-listing-{name}")
        self._check_policy()

    def _check_policy(self) -> None:
        """Tell entries of the policy that name no tool, each once."""
        tools = {name: [tool["name"] for tool in known.tools] for name, known in self._known.items()}
        unused = unused_overrides(self._settings.tool_policy, tools, self.unreached)
        for sentence in unused:
            if sentence not in self._told:
                _log.warning("%s; correct it: as it stands it changes nothing", sentence)
        self._told = frozenset(unused)

    def _is_old(self, name: str) -> bool:
        tools = self._known.get(name)
        return tools is None or _now() - tools.fetched_at > self._settings.catalogue_ttl * 1000

    def _may_ask(self, name: str) -> bool:
        return time.monotonic() - self._listed_at.get(name, float("-inf")) >= self._look_again_s

    async def _list(self, name: str) -> None:
        """List one server; a failure leaves the copy that there is."""
        self._listed_at[name] = time.monotonic()
        try:
            listing = await self._servers.list_tools(name)
        except ToolFailure as error:
            self._failures[name] = str(error)
            _log.warning("tools of MCP server %s can't be listed, their last copy serves: %s", name, error)
            return
        self._failures.pop(name, None)
        tools = ServerTools.listed(name, listing, _now())
        changed = name not in self._known or self._known[name].version != tools.version
        self._known[name] = tools
        if changed:
            _log.info("MCP server %s offers %d tools (version %s)", name, len(tools.tools), tools.version)
        self._rebuild()
        await self._store.save(tools)

    async def _load(self) -> None:
        """Take over what other processes have seen later than this one."""
        for tools in await self._store.load():
            mine = self._known.get(tools.server)
            if mine is None or mine.fetched_at < tools.fetched_at:
                self._known[tools.server] = tools
        self._rebuild()

    def _rebuild(self) -> None:
        oldest = _now() - TTL_S * 1000
        present = self._live or frozenset()
        self._known = {
            name: tools for name, tools in self._known.items() if name in present or tools.fetched_at >= oldest
        }
        self._index = ToolIndex(self._known.values(), self._live, self._settings.tool_policy)
        self._change.set_result(None)
        self._change = asyncio.get_running_loop().create_future()

    def _reasons(self) -> str:
        if not self._live:
            return ": none is registered; set TOOLFLEET_MCP_CONFIG, or register one in Consul with the tag 'mcp'"
        return "".join(f"; {reason}" for _, reason in sorted(self._failures.items()))


def _now() -> int:
    return int(time.time() * 1000)
