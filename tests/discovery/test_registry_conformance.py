"""What every `Registry` promises, asked of the one over settings and of the one over a real Consul agent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.discovery.conftest import Catalogue
from toolfleet.services.discovery.consul_registry import ConsulRegistry
from toolfleet.services.discovery.models import ServiceNotFound
from toolfleet.services.discovery.registry import Registry
from toolfleet.services.discovery.static_registry import StaticRegistry
from toolfleet.settings import Settings

Address = tuple[str, int]


class World(Protocol):
    """A place where services can be put, and the registry that finds them there."""

    registry: Registry

    async def has_nats(self, *addresses: Address) -> None: ...
    async def has_redis(self, address: Address) -> None: ...
    async def has_mcp(self, servers: Mapping[str, Address]) -> None: ...


class StaticWorld:
    def __init__(self, make_settings: Callable[..., Settings], folder: Path) -> None:
        self._make_settings = make_settings
        self._config = folder / "mcp.json"
        self.registry: Registry = StaticRegistry(make_settings())

    async def has_nats(self, *addresses: Address) -> None:
        self._set(nats_url=", ".join(f"nats://{netloc(each)}" for each in addresses))

    async def has_redis(self, address: Address) -> None:
        self._set(redis_url=f"redis://{netloc(address)}/0")

    async def has_mcp(self, servers: Mapping[str, Address]) -> None:
        content = {name: {"url": f"http://{netloc(each)}/mcp"} for name, each in servers.items()}
        self._config.write_text(json.dumps({"mcpServers": content}))
        self._set(mcp_config=self._config)

    def _set(self, **fields: object) -> None:
        self.registry = StaticRegistry(self._make_settings(**fields))


class ConsulWorld:
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self.registry: Registry = ConsulRegistry(catalogue.address)

    async def has_nats(self, *addresses: Address) -> None:
        for host, port in addresses:
            await self._catalogue.register("nats-grpc-service", port, address=host)

    async def has_redis(self, address: Address) -> None:
        await self._catalogue.register("redis-grpc-service", address[1], address=address[0])

    async def has_mcp(self, servers: Mapping[str, Address]) -> None:
        for name, (host, port) in servers.items():
            await self._catalogue.register(name, port, address=host, tags=["mcp"])


def netloc(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@pytest.fixture(params=["static", "consul"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    made: World
    if request.param == "static":
        made = StaticWorld(request.getfixturevalue("make_settings"), tmp_path)
        yield made
    else:
        catalogue = Catalogue(request.getfixturevalue("consul_agent"))
        made = ConsulWorld(catalogue)
        yield made
        await catalogue.close()
    await made.registry.close()
    await made.registry.close()


async def test_every_nats_server_is_listed(world: World) -> None:
    await world.has_nats(("10.0.0.1", 4222), ("10.0.0.2", 4223))
    assert await world.registry.nats_urls() == ["nats://10.0.0.1:4222", "nats://10.0.0.2:4223"]


async def test_redis_is_found_with_its_database(world: World) -> None:
    await world.has_redis(("10.0.0.3", 6379))
    assert await world.registry.redis_url() == "redis://10.0.0.3:6379/0"


async def test_ipv6_addresses_are_bracketed(world: World) -> None:
    await world.has_nats(("fd00::1", 4222))
    assert await world.registry.nats_urls() == ["nats://[fd00::1]:4222"]


async def test_mcp_servers_are_listed_by_name(world: World) -> None:
    await world.has_mcp({"time": ("10.0.0.5", 8090), "web": ("10.0.0.4", 8091)})
    found = {server.name: server.url for server in await world.registry.mcp_servers()}
    assert found == {"time": "http://10.0.0.5:8090/mcp", "web": "http://10.0.0.4:8091/mcp"}


async def test_no_mcp_server_is_an_empty_list(world: World) -> None:
    assert await world.registry.mcp_servers() == []


async def test_what_is_not_there_is_said_with_the_variable_to_set(world: World) -> None:
    with pytest.raises(ServiceNotFound, match="NATS_URL"):
        await world.registry.nats_urls()
    with pytest.raises(ServiceNotFound, match="REDIS_URL"):
        await world.registry.redis_url()


async def test_the_queue_has_no_meta_unless_it_is_given(world: World) -> None:
    await world.has_nats(("10.0.0.1", 4222))
    assert await world.registry.queue_meta() == {}
