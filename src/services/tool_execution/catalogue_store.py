"""The tool catalogue in Redis, shared by the processes of the fleet and outliving the tool servers.

`tf:catalogue:<server>` holds one server's tools as JSON; the sorted set `tf:catalogue_servers` names the servers, by
the time (epoch milliseconds) their tools were fetched. Both live for seven days after the last fetch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from toolfleet.services.background_jobs.errors import StoreError
from toolfleet.services.background_jobs.task_models import Millis

_log = logging.getLogger(__name__)

_FORMAT: Final = 1
_KEY: Final = "tf:catalogue:"
_INDEX: Final = "tf:catalogue_servers"
TTL_S: Final = 7 * 24 * 3600
"""How long the tools of a server that is gone are remembered."""


@dataclass(frozen=True, slots=True)
class ServerTools:
    """The tools of one server as it last listed them."""

    server: str
    version: str
    """Hash of the listing: the same tools have the same version."""
    fetched_at: Millis
    tools: tuple[Mapping[str, Any], ...]
    """Each with `name`, `description`, `inputSchema` and `annotations`, in the protocol's form."""

    @classmethod
    def listed(cls, server: str, listing: Sequence[Mapping[str, Any]], at: Millis) -> ServerTools:
        """From a server's listing; only the fields that the catalogue uses are kept."""
        tools = tuple(
            {
                "name": tool["name"],
                "description": tool.get("description") or "",
                "inputSchema": tool.get("inputSchema") or {},
                "annotations": tool.get("annotations") or {},
            }
            for tool in listing
        )
        text = json.dumps(tools, sort_keys=True)
        return cls(server, hashlib.sha256(text.encode()).hexdigest()[:16], at, tools)

    def to_json(self) -> str:
        """As it stands in Redis."""
        return json.dumps(
            {
                "v": _FORMAT,
                "server": self.server,
                "version": self.version,
                "fetched_at": self.fetched_at,
                "tools": self.tools,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> ServerTools | None:
        """From Redis; None for what another version wrote."""
        try:
            kept = json.loads(text)
            if kept["v"] != _FORMAT:
                return None
            return cls(kept["server"], kept["version"], kept["fetched_at"], tuple(kept["tools"]))
        except (ValueError, KeyError, TypeError):
            return None


class SharedStore(Protocol):
    """What the copy needs of Redis; `RedisStateManager` is one."""

    async def read(self, *command: Any) -> Any:
        """One command and its answer, bounded; raises `StoreError`."""
        ...


class CatalogueStore:
    """Reads and writes the shared copy; without Redis it holds nothing, and the callers go on with what they have.

    Args:
        redis: None where there is none.
    """

    def __init__(self, redis: SharedStore | None) -> None:
        self._redis = redis

    async def load(self) -> list[ServerTools]:
        """The tools of all servers that were reached in the last seven days; none where Redis does not answer."""
        if self._redis is None:
            return []
        try:
            names = [
                name.decode() if isinstance(name, bytes) else str(name)
                for name in await self._redis.read("ZRANGE", _INDEX, 0, -1)
            ]
            # Key by key and not MGET: in a cluster the keys belong to different servers.
            texts = [await self._redis.read("GET", _KEY + name) for name in names]
        except StoreError as error:
            _log.warning("the shared tool catalogue can't be read, this process's copy serves: %s", error)
            return []
        found = (ServerTools.from_json(text) for text in texts if text is not None)
        return [tools for tools in found if tools is not None]

    async def save(self, tools: ServerTools) -> None:
        """Keep a server's tools for the other processes; a Redis that does not answer is left alone."""
        if self._redis is None:
            return
        try:
            await self._redis.read("SET", _KEY + tools.server, tools.to_json(), "EX", TTL_S)
            await self._redis.read("ZADD", _INDEX, tools.fetched_at, tools.server)
            await self._redis.read("ZREMRANGEBYSCORE", _INDEX, "-inf", tools.fetched_at - TTL_S * 1000)
            await self._redis.read("EXPIRE", _INDEX, TTL_S)
        except StoreError as error:
            _log.warning("the shared tool catalogue can't be written: %s", error)
