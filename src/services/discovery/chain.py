"""Which registry answers what: explicit settings, then Consul, then a message that says what to set."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from toolfleet.services.discovery.models import DiscoveryError, McpServer, ServiceNotFound
from toolfleet.services.discovery.registry import Registry
from toolfleet.services.discovery.static_registry import StaticRegistry
from toolfleet.settings import Settings

_log = structlog.get_logger(__name__)


def build_registry(settings: Settings) -> Registry:
    """The registry that `settings` describe. There is no default address: what is not set is not found.

    Raises:
        DiscoveryError: CONSUL_HTTP_ADDR is not an address.
    """
    consul = None
    if settings.consul_http_addr:
        # Late: py-consul brings two HTTP clients along, a sixth of what a worker without Consul takes to start.
        from toolfleet.services.discovery.consul_registry import ConsulRegistry

        token = settings.consul_http_token
        consul = ConsulRegistry(
            settings.consul_http_addr,
            token.get_secret_value() if token else None,
            nats_service=settings.nats_service_name,
            redis_service=settings.redis_service_name,
        )
    return ChainedRegistry(settings, StaticRegistry(settings), consul)


class ChainedRegistry:
    """Explicit settings first, Consul where there are none."""

    def __init__(self, settings: Settings, static: Registry, consul: Registry | None) -> None:
        self._settings = settings
        self._static = static
        self._consul = consul

    async def nats_urls(self) -> list[str]:
        return await self._for_nats().nats_urls()

    async def redis_url(self) -> str:
        if self._settings.redis_url is not None:
            return await self._static.redis_url()
        if self._consul is None:
            raise _nowhere("Redis", "REDIS_URL", "redis://host:port/0", self._settings.redis_service_name)
        return await self._consul.redis_url()

    async def mcp_servers(self) -> list[McpServer]:
        """The file's servers, then Consul's. Of two with one name the file's counts: it is what this host's operator
        wrote down, and a registration must not be able to put itself in its place.

        Raises:
            DiscoveryError: the file cannot be used; or Consul cannot, never could, and the file has no server.
        """
        servers = {server.name: server for server in await self._static.mcp_servers()}
        for found in await self._consul_mcp_servers(is_needed=not servers):
            if found.name in servers:
                _log.warning(
                    "mcp_service_ignored", service=found.name, reason="the mcp_config file has one of this name"
                )
            else:
                servers[found.name] = found
        return list(servers.values())

    async def queue_meta(self) -> Mapping[str, str]:
        return await self._for_nats().queue_meta()

    async def close(self) -> None:
        await self._static.close()
        if self._consul is not None:
            await self._consul.close()

    def _for_nats(self) -> Registry:
        if self._settings.nats_url is not None:
            return self._static
        if self._consul is None:
            raise _nowhere("NATS", "NATS_URL", "nats://host:port", self._settings.nats_service_name)
        return self._consul

    async def _consul_mcp_servers(self, *, is_needed: bool) -> list[McpServer]:
        if self._consul is None:
            return []
        try:
            return await self._consul.mcp_servers()
        except DiscoveryError as error:
            if is_needed:
                raise
            _log.warning("consul_mcp_servers_unknown", reason=str(error), using="the mcp_config file alone")
            return []


def _nowhere(what: str, variable: str, form: str, service: str) -> ServiceNotFound:
    return ServiceNotFound(
        f"it is not known where {what} is. Set {variable} ({form}), or CONSUL_HTTP_ADDR (host:port) of a Consul agent "
        f"in which the service '{service}' is registered"
    )
