"""Explicit settings first, then Consul, then a message: never a silent default."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.discovery.conftest import Catalogue
from toolfleet.services.discovery.chain import build_registry
from toolfleet.services.discovery.models import DiscoveryError, ServiceNotFound
from toolfleet.services.discovery.registry import Registry
from toolfleet.services.embedded.server import free_ports
from toolfleet.settings import Settings

MakeSettings = Callable[..., Settings]


@asynccontextmanager
async def built(settings: Settings) -> AsyncIterator[Registry]:
    registry = build_registry(settings)
    try:
        yield registry
    finally:
        await registry.close()


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens."""
    return f"127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
def mcp_file(tmp_path: Path) -> Path:
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {"web": {"url": "http://file/mcp"}, "time": {"command": "t"}}}))
    return path


async def test_nothing_set_is_said_with_every_way_out(make_settings: MakeSettings) -> None:
    async with built(make_settings(nats_service_name="my-nats")) as registry:
        with pytest.raises(ServiceNotFound, match=r"NATS is.*NATS_URL.*CONSUL_HTTP_ADDR.*'my-nats'"):
            await registry.nats_urls()
        with pytest.raises(ServiceNotFound, match=r"NATS is.*NATS_URL"):
            await registry.queue_meta()
        with pytest.raises(ServiceNotFound, match=r"Redis is.*REDIS_URL.*CONSUL_HTTP_ADDR.*'redis-grpc-service'"):
            await registry.redis_url()
        assert await registry.mcp_servers() == []


async def test_an_explicit_url_is_taken_without_asking_consul(make_settings: MakeSettings, nobody: str) -> None:
    settings = make_settings(nats_url="nats://n:1", redis_url="redis://r:2/3", consul_http_addr=nobody)
    async with built(settings) as registry:
        assert await registry.nats_urls() == ["nats://n:1"]
        assert await registry.redis_url() == "redis://r:2/3"
        assert await registry.queue_meta() == {}


async def test_consul_is_asked_for_what_has_no_url(make_settings: MakeSettings, catalogue: Catalogue) -> None:
    await catalogue.register("my-nats", 4222, meta={"stream": "S"})
    settings = make_settings(redis_url="redis://r:2/3", consul_http_addr=catalogue.address, nats_service_name="my-nats")
    async with built(settings) as registry:
        assert await registry.nats_urls() == ["nats://127.0.0.1:4222"]
        assert await registry.queue_meta() == {"stream": "S"}
        assert await registry.redis_url() == "redis://r:2/3"


async def test_the_file_and_consul_are_put_together_and_the_file_wins(
    make_settings: MakeSettings, catalogue: Catalogue, mcp_file: Path
) -> None:
    await catalogue.register("web", 1, tags=["mcp"])
    await catalogue.register("crawl", 2, tags=["mcp"])
    async with built(make_settings(consul_http_addr=catalogue.address, mcp_config=mcp_file)) as registry:
        servers = {server.name: server.location for server in await registry.mcp_servers()}
    assert servers == {"web": "http://file/mcp", "time": "t", "crawl": "http://127.0.0.1:2/mcp"}


async def test_the_file_serves_while_consul_was_never_reached(
    make_settings: MakeSettings, nobody: str, mcp_file: Path
) -> None:
    async with built(make_settings(consul_http_addr=nobody, mcp_config=mcp_file)) as registry:
        assert [server.name for server in await registry.mcp_servers()] == ["web", "time"]
    async with built(make_settings(consul_http_addr=nobody)) as registry:
        with pytest.raises(DiscoveryError, match="cannot be asked"):
            await registry.mcp_servers()


async def test_the_file_is_read_anew_and_its_variables_come_from_settings(
    make_settings: MakeSettings, mcp_file: Path
) -> None:
    async with built(make_settings(mcp_config=mcp_file, mcp_variables={"HOST": "host"})) as registry:
        assert len(await registry.mcp_servers()) == 2
        mcp_file.write_text(json.dumps({"mcpServers": {"web": {"url": "http://${HOST}/mcp"}}}))
        assert [server.url for server in await registry.mcp_servers()] == ["http://host/mcp"]


@pytest.mark.parametrize(
    ("field", "url", "said"),
    [
        ("nats_url", "http://user:s3cr3t@host", "NATS_URL does not start with nats://"),
        ("nats_url", "nats://a:1, nats://", "NATS_URL names no host"),
        ("nats_url", "nats://u:s3cr3t@h:port", "NATS_URL is not a URL"),
        ("nats_url", " , ", "NATS_URL is empty"),
        ("redis_url", "host:6379", "REDIS_URL does not start with redis://"),
        ("redis_url", "redis:///0", "REDIS_URL names no host"),
    ],
)
async def test_a_wrong_url_is_refused_without_showing_it(
    make_settings: MakeSettings, field: str, url: str, said: str
) -> None:
    async with built(make_settings(**{field: url})) as registry:
        with pytest.raises(DiscoveryError, match=said) as caught:
            await (registry.nats_urls() if field == "nats_url" else registry.redis_url())
    assert "s3cr3t" not in str(caught.value)


def test_a_wrong_consul_address_is_refused_at_once(make_settings: MakeSettings) -> None:
    with pytest.raises(DiscoveryError, match="CONSUL_HTTP_ADDR"):
        build_registry(make_settings(consul_http_addr="unix:///run/consul"))
