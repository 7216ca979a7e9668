"""What only Consul can do: health, meta, tokens, and an agent that goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.discovery.conftest import Catalogue
from tests.support.waiting import wait_until
from toolfleet.services.discovery.consul_client import parse_address
from toolfleet.services.discovery.consul_registry import ConsulRegistry
from toolfleet.services.discovery.models import DiscoveryError, ServiceNotFound
from toolfleet.services.embedded.consul_agent import EmbeddedConsul

NATS = "nats-grpc-service"
REDIS = "redis-grpc-service"


@asynccontextmanager
async def registry_of(address: str, token: str | None = None, timeout: float = 5) -> AsyncIterator[ConsulRegistry]:
    registry = ConsulRegistry(address, token, timeout=timeout)
    try:
        yield registry
    finally:
        await registry.close()


@pytest.fixture
async def registry(catalogue: Catalogue) -> AsyncIterator[ConsulRegistry]:
    async with registry_of(catalogue.address) as opened:
        yield opened


@pytest.fixture
async def own_agent(consul_installed: None, tmp_path: Path) -> AsyncIterator[EmbeddedConsul]:
    async with EmbeddedConsul(tmp_path) as agent:
        yield agent


async def test_only_passing_instances_count(catalogue: Catalogue, registry: ConsulRegistry) -> None:
    await catalogue.register(NATS, 1, status="critical")
    second = await catalogue.register(NATS, 2)
    await catalogue.register(NATS, 3)
    assert await registry.nats_urls() == ["nats://127.0.0.1:2", "nats://127.0.0.1:3"]
    await catalogue.fail(NATS, second)
    assert await registry.nats_urls() == ["nats://127.0.0.1:3"]


async def test_a_critical_mcp_server_is_left_out(catalogue: Catalogue, registry: ConsulRegistry) -> None:
    await catalogue.register("up", 1, tags=["mcp"])
    await catalogue.register("down", 2, tags=["mcp"], status="critical")
    await catalogue.register("other", 3, tags=["http"])
    assert [server.name for server in await registry.mcp_servers()] == ["up"]


async def test_of_several_redis_servers_every_process_takes_the_same(
    catalogue: Catalogue, registry: ConsulRegistry
) -> None:
    await catalogue.register(REDIS, 7002)
    await catalogue.register(REDIS, 7001)
    assert await registry.redis_url() == "redis://127.0.0.1:7001/0"


async def test_meta_names_scheme_and_path(catalogue: Catalogue, registry: ConsulRegistry) -> None:
    await catalogue.register("web", 443, tags=["mcp"], meta={"scheme": "https", "path": "tools/mcp"})
    await catalogue.register(NATS, 1, meta={"scheme": "tls"})
    await catalogue.register(REDIS, 2, meta={"scheme": "rediss"})
    assert [server.url for server in await registry.mcp_servers()] == ["https://127.0.0.1:443/tools/mcp"]
    assert await registry.nats_urls() == ["tls://127.0.0.1:1"]
    assert await registry.redis_url() == "rediss://127.0.0.1:2/0"


async def test_a_registration_that_cannot_be_used_takes_no_other_away(
    catalogue: Catalogue, registry: ConsulRegistry
) -> None:
    await catalogue.register("bad", 1, tags=["mcp"], meta={"scheme": "ftp"})
    await catalogue.register("good", 2, tags=["mcp"])
    assert [server.name for server in await registry.mcp_servers()] == ["good"]


async def test_an_unknown_scheme_of_a_needed_service_is_an_error(
    catalogue: Catalogue, registry: ConsulRegistry
) -> None:
    await catalogue.register(REDIS, 1, meta={"scheme": "http"})
    with pytest.raises(DiscoveryError, match=r"'redis-grpc-service'.*'http'.*redis or rediss"):
        await registry.redis_url()


async def test_a_service_without_an_address_is_at_its_node(catalogue: Catalogue, registry: ConsulRegistry) -> None:
    await catalogue.register(REDIS, 6379, address=None)
    assert await registry.redis_url() == "redis://127.0.0.1:6379/0"


async def test_the_nats_service_names_the_stream(catalogue: Catalogue, registry: ConsulRegistry) -> None:
    meta = {"stream": "OTHER", "subject_prefix": "other.tasks", "rack": "7"}
    await catalogue.register(NATS, 1, meta=meta)
    await catalogue.register(NATS, 2, meta=meta)
    assert await registry.queue_meta() == {"stream": "OTHER", "subject_prefix": "other.tasks"}


async def test_instances_that_disagree_about_the_stream_are_refused(
    catalogue: Catalogue, registry: ConsulRegistry
) -> None:
    await catalogue.register(NATS, 1, meta={"stream": "ONE"})
    await catalogue.register(NATS, 2, meta={"stream": "TWO"})
    with pytest.raises(DiscoveryError, match="disagree about the meta 'stream'"):
        await registry.queue_meta()


async def test_the_last_answer_serves_while_the_agent_is_away(own_agent: EmbeddedConsul) -> None:
    catalogue = Catalogue(own_agent)
    await catalogue.register(NATS, 1, meta={"stream": "S"})
    await catalogue.register(REDIS, 2)
    await catalogue.register("web", 3, tags=["mcp"])
    await catalogue.leave()
    async with registry_of(own_agent.address, timeout=0.5) as registry:
        before = await answers(registry)
        await own_agent.pause()
        assert await answers(registry) == before, "an agent that hangs"
        await own_agent.resume()
        await own_agent.kill()
        assert await answers(registry) == before, "an agent that is gone"
        await own_agent.start()
        # In dev mode a restarted agent has forgotten its services: this answer is a new one.
        with pytest.raises(ServiceNotFound):
            await registry.nats_urls()


async def answers(registry: ConsulRegistry) -> list[object]:
    return [
        await registry.nats_urls(),
        await registry.redis_url(),
        await registry.mcp_servers(),
        await registry.queue_meta(),
    ]


async def test_an_agent_that_was_never_reached_is_an_error(own_agent: EmbeddedConsul) -> None:
    await own_agent.kill()
    async with registry_of(own_agent.address) as registry:
        for ask in (registry.nats_urls, registry.redis_url, registry.mcp_servers, registry.queue_meta):
            with pytest.raises(DiscoveryError, match=r"cannot be asked.*CONSUL_HTTP_ADDR") as caught:
                await ask()
            assert not isinstance(caught.value, ServiceNotFound)


async def test_an_agent_that_answers_byte_by_byte_for_ever_is_given_up() -> None:
    asked = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        if not await reader.read(4096):
                            break
        writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with server, registry_of(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout=0.3) as registry:
        async with asyncio.timeout(10):
            with pytest.raises(DiscoveryError, match=r"no whole answer within 0\.3 s"):
                await registry.nats_urls()
        assert asked.is_set()


async def test_the_token_is_sent_and_a_missing_or_wrong_one_is_told(
    consul_installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "11111111-2222-3333-4444-555555555555"
    # py-consul would prefer this one to the caller's.
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "99999999-2222-3333-4444-555555555555")
    async with EmbeddedConsul(tmp_path, token=token) as agent:
        catalogue = Catalogue(agent, token)
        await wait_until(lambda: token_works(agent, token), "the agent knows its first token")
        await catalogue.register(REDIS, 6379)
        async with registry_of(agent.address, token) as registry:
            assert await registry.redis_url() == "redis://127.0.0.1:6379/0"
        async with registry_of(agent.address) as registry:
            with pytest.raises(ServiceNotFound, match="CONSUL_HTTP_TOKEN"):
                await registry.redis_url()
        async with registry_of(agent.address, "00000000-2222-3333-4444-555555555555") as registry:
            with pytest.raises(DiscoveryError, match="refuses this token") as caught:
                await registry.redis_url()
            assert "00000000" not in str(caught.value)
        await catalogue.leave()


async def token_works(agent: EmbeddedConsul, token: str) -> bool:
    async with registry_of(agent.address, token) as registry:
        try:
            return await registry.mcp_servers() == []
        except DiscoveryError:
            return False


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:8500", ("http", "127.0.0.1", 8500)),
        ("consul", ("http", "consul", 8500)),
        ("http://consul:81/", ("http", "consul", 81)),
        ("https://consul:8501", ("https", "consul", 8501)),
        ("[::1]:8500", ("http", "[::1]", 8500)),
    ],
)
def test_addresses_come_with_and_without_a_scheme(address: str, parts: tuple[str, str, int]) -> None:
    assert parse_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "unix:///run/consul", "ftp://consul", "consul:port", "http://consul/x", "[::1"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(DiscoveryError, match="CONSUL_HTTP_ADDR is not of the form"):
        parse_address(address)


async def test_an_address_with_a_scheme_is_asked(catalogue: Catalogue) -> None:
    await catalogue.register(REDIS, 6379)
    async with registry_of(f"http://{catalogue.address}") as registry:
        assert await registry.redis_url() == "redis://127.0.0.1:6379/0"
