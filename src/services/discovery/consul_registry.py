"""The registry of a Consul agent: passing instances only, and the last answer while the agent is away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import httpx
import structlog
from consul import ACLPermissionDenied, ConsulException

from toolfleet.services.discovery.consul_client import ConsulClient
from toolfleet.services.discovery.models import DiscoveryError, Endpoint, McpServer, ServiceNotFound

MCP_TAG = "mcp"
"""Services with this tag are MCP servers."""

_DEFAULT_MCP_PATH = "/mcp"
_QUEUE_META = ("stream", "subject_prefix")

Last = TypeVar("Last")

_log = structlog.get_logger(__name__)


class ConsulRegistry:
    """Answers from Consul.

    NATS and Redis are found by service name, MCP servers by the tag `mcp`; the service's name becomes the MCP server's.
    Meta that counts, on a service: `scheme` (NATS `nats` or `tls`, Redis `redis` or `rediss`, MCP `http` or `https`),
    `path` (MCP; default ``/mcp``), `stream` and `subject_prefix` (NATS).

    Where several instances pass, NATS gets all of them as one cluster; of Redis and of each MCP server the first by
    address is taken, so that every process takes the same one.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        *,
        nats_service: str = "nats-grpc-service",
        redis_service: str = "redis-grpc-service",
        timeout: float = 5.0,
    ) -> None:
        """
        Args:
            address: as CONSUL_HTTP_ADDR has it.
            token: an ACL token; it needs `service:read` and `node:read`.
            nats_service: the name under which the NATS servers are registered.
            redis_service: the name under which the Redis server is registered.
            timeout: seconds until an agent that does not answer counts as away.

        Raises:
            DiscoveryError: the address is not of the form of CONSUL_HTTP_ADDR.
        """
        self._client = ConsulClient(address, token, timeout)
        self._address = address
        self._nats_service = nats_service
        self._redis_service = redis_service
        self._last_instances: dict[tuple[str, str | None], list[Endpoint]] = {}
        self._last_mcp_names: list[str] | None = None
        self._away = False

    async def nats_urls(self) -> list[str]:
        """All passing instances; raises as `Registry` says."""
        instances = await self._required(self._nats_service, "NATS_URL")
        return [_url(each, self._nats_service, ("nats", "tls")) for each in instances]

    async def redis_url(self) -> str:
        """The first passing instance by address, database 0; raises as `Registry` says."""
        instances = await self._required(self._redis_service, "REDIS_URL")
        return _url(instances[0], self._redis_service, ("redis", "rediss")) + "/0"

    async def mcp_servers(self) -> list[McpServer]:
        """One for each service with the tag `mcp` that has a passing instance, by name.

        A registration that cannot be used is left out and logged: it must not take the other servers away.

        Raises:
            DiscoveryError: Consul cannot be asked and never was.
        """
        names = await self._mcp_names()
        answers = await asyncio.gather(*(self._instances(name, MCP_TAG) for name in names))
        servers = []
        for name, instances in zip(names, answers, strict=True):
            try:
                servers += [_mcp_server(name, instances[0])] if instances else []
            except (DiscoveryError, ValueError) as error:
                _log.warning("mcp_service_ignored", service=name, reason=str(error))
        return servers

    async def queue_meta(self) -> Mapping[str, str]:
        """`stream` and `subject_prefix` of the NATS service; raises as `Registry` says.

        Raises:
            DiscoveryError: its instances disagree: publishers and workers would use different streams.
        """
        instances = await self._required(self._nats_service, "NATS_URL")
        meta: dict[str, str] = {}
        for key in _QUEUE_META:
            first, *others = {each.meta.get(key, "") for each in instances}
            if others:
                raise DiscoveryError(
                    f"the instances of '{self._nats_service}' in Consul disagree about the meta '{key}'; "
                    "register all of them with the same value"
                )
            if first:
                meta[key] = first
        return meta

    async def close(self) -> None:
        await self._client.http.close()

    async def _required(self, service: str, variable: str) -> list[Endpoint]:
        instances = await self._instances(service)
        if not instances:
            hint = "" if self._client.token else ", or CONSUL_HTTP_TOKEN if this agent shows services to tokens only"
            raise ServiceNotFound(
                f"Consul at {self._address} has no passing instance of '{service}'; "
                f"register it, or set {variable}{hint}"
            )
        return instances

    async def _instances(self, service: str, tag: str | None = None) -> list[Endpoint]:
        try:
            _, entries = await self._client.health.service(service, passing=True, tag=tag)
        except (ConsulException, httpx.HTTPError) as error:
            return self._last_answer(self._last_instances.get((service, tag)), error)
        self._is_back()
        instances = sorted(map(_endpoint, entries or []), key=lambda each: (each.host, each.port))
        self._last_instances[service, tag] = instances
        return instances

    async def _mcp_names(self) -> list[str]:
        try:
            _, services = await self._client.catalog.services()
        except (ConsulException, httpx.HTTPError) as error:
            return self._last_answer(self._last_mcp_names, error)
        self._is_back()
        self._last_mcp_names = sorted(name for name, tags in (services or {}).items() if MCP_TAG in tags)
        return self._last_mcp_names

    def _last_answer(self, last: Last | None, error: Exception) -> Last:
        # A refused token is no outage: an old answer would hide that this process has lost its rights.
        if isinstance(error, ACLPermissionDenied):
            raise DiscoveryError(
                f"Consul at {self._address} refuses this token; set CONSUL_HTTP_TOKEN to one with "
                "service:read and node:read"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        if last is None:
            raise DiscoveryError(
                f"Consul at {self._address} cannot be asked ({reason}); start it, correct CONSUL_HTTP_ADDR, "
                "or set NATS_URL and REDIS_URL"
            ) from error
        if not self._away:
            self._away = True
            _log.warning("consul_away", address=self._address, reason=reason, using="the last answer")
        return last

    def _is_back(self) -> None:
        if self._away:
            self._away = False
            _log.info("consul_back", address=self._address)


def _endpoint(entry: Mapping[str, Any]) -> Endpoint:
    service = entry["Service"]
    # A service without an address of its own runs at its node's.
    return Endpoint(service["Address"] or entry["Node"]["Address"], service["Port"], service.get("Meta") or {})


def _url(instance: Endpoint, service: str, schemes: Iterable[str]) -> str:
    """The first of `schemes` is the default."""
    allowed = list(schemes)
    scheme = instance.meta.get("scheme") or allowed[0]
    if scheme not in allowed:
        raise DiscoveryError(
            f"the service '{service}' in Consul has the meta scheme '{scheme}'; it can be {' or '.join(allowed)}"
        )
    return f"{scheme}://{instance.netloc}"


def _mcp_server(name: str, instance: Endpoint) -> McpServer:
    path = instance.meta.get("path") or _DEFAULT_MCP_PATH
    return McpServer(name=name, url=f"{_url(instance, name, ('http', 'https'))}/{path.lstrip('/')}")
