"""The embedded servers, each for real: what they promise about ports, data and errors."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import httpx
import nats
import pytest
import redis
from redis.asyncio import Redis

from tests.support.waiting import wait_until
from toolfleet.services.embedded import server as server_module
from toolfleet.services.embedded.consul_agent import EmbeddedConsul
from toolfleet.services.embedded.errors import ServerNotInstalled, ServerNotRunning, ServerStartFailed
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.server import HOST, EmbeddedServer, free_ports
from toolfleet.services.embedded.valkey_server import EmbeddedValkey

QUEUE_AND_STORE = [EmbeddedNats, EmbeddedValkey]


@pytest.mark.parametrize("make", QUEUE_AND_STORE)
async def test_the_port_stays_over_kill_and_restart(make: type[EmbeddedServer], tmp_path: Path) -> None:
    async with make(tmp_path / "a folder with spaces and 'quotes\"") as server:
        port, first_pid = server.port, server.pid
        await server.kill()
        assert not server.running
        await server.start()
        await server.restart()
        assert (server.port, server.running) == (port, True)
        assert server.pid != first_pid
    assert not server.running


@pytest.mark.parametrize("make", QUEUE_AND_STORE)
async def test_a_taken_port_is_an_error_that_shows_the_log(make: type[EmbeddedServer], tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        server = make(tmp_path, port=port)  # type: ignore[call-arg]
        with pytest.raises(
            ServerStartFailed, match=r"(?s)ended at start.*address already in use|Address already in use"
        ):
            await server.start()
    assert not server.running


@pytest.mark.parametrize("make", QUEUE_AND_STORE)
async def test_a_server_that_is_not_running_says_so(make: type[EmbeddedServer], tmp_path: Path) -> None:
    server = make(tmp_path)
    for property_name in ("port", "url", "pid"):
        with pytest.raises(ServerNotRunning, match="start it first"):
            getattr(server, property_name)
    await server.stop()
    await server.kill()


async def test_a_port_that_someone_took_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as taken:
        offers = [(taken.getsockname()[1],)]
        monkeypatch.setattr(server_module, "free_ports", lambda count: offers.pop() if offers else free_ports(count))
        async with EmbeddedValkey(tmp_path) as server:
            assert server.port != taken.getsockname()[1]


async def test_nats_keeps_its_streams_over_a_crash(tmp_path: Path) -> None:
    async with EmbeddedNats(tmp_path, monitoring=True) as server:
        async with httpx.AsyncClient() as client:
            state = (await client.get(f"{server.monitoring_url}/jsz")).json()
        assert state["config"]["sync_always"] is True
        connection = await nats.connect(server.url)
        await connection.jetstream().add_stream(name="S", subjects=["s"])
        await connection.jetstream().publish("s", b"kept")
        await connection.close()
        await server.kill()
        await server.start()
        connection = await nats.connect(server.url)
        assert (await connection.jetstream().get_last_msg("S", "s")).data == b"kept"
        await connection.close()


async def test_valkey_keeps_its_keys_over_a_crash(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path) as server:
        async with Redis.from_url(server.url, decode_responses=True) as client:
            assert await client.config_get("append*sync") == {"appendfsync": "always"}
            await client.set("key", "kept")
        await server.kill()
        await server.start()
        async with Redis.from_url(server.url, decode_responses=True) as client:
            assert await client.get("key") == "kept"


async def test_a_paused_server_answers_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    async with (
        EmbeddedValkey(tmp_path, durable=False) as server,
        Redis.from_url(server.url, socket_timeout=0.1, retry=None) as client,
    ):
        await client.ping()
        await server.pause()
        with pytest.raises(redis.TimeoutError):
            await client.ping()
        await server.resume()
        await wait_until(lambda: answers(client), "the resumed server answers")


async def test_a_server_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("a file where the store's folder should be")
    with pytest.raises(ServerStartFailed, match=r"(?s)exit code 1.*nats-server\.log:\n.*not a directory"):
        await EmbeddedNats(tmp_path).start()


async def test_consul_serves_on_loopback_only_and_needs_its_token(consul_installed: None, tmp_path: Path) -> None:
    token = "11111111-2222-3333-4444-555555555555"
    async with EmbeddedConsul(tmp_path, token=token) as agent, httpx.AsyncClient() as client:
        config = json.loads((tmp_path / "consul.json").read_text())
        assert (config["client_addr"], config["bind_addr"]) == (HOST, HOST)
        assert (await client.get(f"http://{agent.address}/v1/agent/self")).status_code == 403


async def test_a_missing_program_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerNotInstalled, match="make consul"):
        await EmbeddedConsul(tmp_path).start()


async def answers(client: Redis) -> bool:
    try:
        return bool(await client.ping())
    except redis.TimeoutError:
        return False


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(20))) == 20
