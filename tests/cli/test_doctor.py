"""`toolfleet doctor` on a stack that is well, and on parts that are not."""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from pathlib import Path

import nats

from tests.cli.conftest import Fleet
from tests.cli.running import Ended, clean_env, toolfleet
from toolfleet.cli.exits import FAILED
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey


def checks(ended: Ended) -> dict[str, dict[str, str]]:
    """By part."""
    return {check["part"]: check for check in ended.json["checks"]}


def test_a_stack_that_is_well(fleet: Fleet) -> None:
    ended = fleet.run("doctor", "--json", **fleet.servers)
    assert ended.code == 0, ended.out
    found = checks(ended)
    assert ended.json["ok"] is True
    assert {check["state"] for check in found.values()} == {"ok"}
    assert found["writes of Redis"]["found"] == "durable: appendonly yes, appendfsync always"
    assert found["writes of NATS"]["found"] == "durable: sync_interval: always"
    assert found["workers"]["found"] == "1 high, 2 normal, 1 low"
    assert "web_crawl" in found["tools of web-tools"]["found"]
    assert found["stream TOOLFLEET_TASKS"]["found"] == found["consumer workers-low"]["found"] == "as it must be"


def test_nothing_is_known_and_nothing_answers() -> None:
    ended = toolfleet("doctor", "--json", "--api", "http://127.0.0.1:1")
    assert ended.code == FAILED
    found = checks(ended)
    assert "Set NATS_URL" in found["NATS"]["advice"]
    assert "Set REDIS_URL" in found["Redis"]["advice"]
    assert "TOOLFLEET_API_URL" in found["API"]["advice"]
    assert "TOOLFLEET_MCP_CONFIG" in found["tools"]["advice"]


def test_servers_that_are_down_are_named_without_their_passwords(tmp_path: Path) -> None:
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"gone": {"url": "http://127.0.0.1:1/mcp"}}}))
    env = clean_env(
        NATS_URL="nats://someone:hunter2@127.0.0.1:1",
        REDIS_URL="redis://:hunter2@127.0.0.1:1/0",
        CONSUL_HTTP_ADDR="127.0.0.1:1",
        TOOLFLEET_MCP_CONFIG=str(config),
    )
    ended = toolfleet("doctor", "--api", "http://127.0.0.1:1", env=env)
    assert ended.code == FAILED
    assert "hunter2" not in ended.out + ended.err
    wrong = [line.split()[1] for line in ended.out.splitlines() if line.startswith("wrong")]
    assert wrong == ["Consul", "NATS", "Redis", "API", "tools"]
    assert "start nats-server, or correct NATS_URL" in ended.out
    assert ".." not in ended.out
    assert "toolfleet doctor" not in ended.out
    assert ended.err == ""


def test_a_server_that_takes_connections_and_is_silent_is_told_from_one_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        env = clean_env(NATS_URL=f"nats://{where}", REDIS_URL=f"redis://{where}")
        ended = toolfleet("doctor", "--json", "--api", f"http://{where}", env=env)
    assert ended.code == FAILED
    assert ended.err == ""
    found = checks(ended)
    assert found["NATS"]["found"] == f"nats://{where}: no answer to the connection"
    assert found["Redis"]["state"] == "wrong"
    assert found["API"]["found"] == "no answer within 6 s"


def test_weaker_settings_and_a_stream_of_somebody_elses(
    nats_server: EmbeddedNats, valkey_server: EmbeddedValkey
) -> None:
    name = f"TASKS_{uuid.uuid4().hex[:8]}"
    asyncio.run(_make_stream(nats_server.url, name))
    env = clean_env(NATS_URL=nats_server.url, REDIS_URL=valkey_server.url, TOOLFLEET_STREAM=name)
    ended = toolfleet("doctor", "--json", "--api", "http://127.0.0.1:1", env=env)
    assert ended.code == FAILED
    found = checks(ended)
    assert found["writes of Redis"]["state"] == "wrong"
    assert "appendfsync always" in found["writes of Redis"]["advice"]
    assert found["writes of NATS"]["state"] == "unsure"
    assert "check nats.conf for sync_interval: always" in found["writes of NATS"]["advice"]
    stream = found[f"stream {name}"]
    assert stream["state"] == "wrong"
    assert "retention is 'limits', expected 'workqueue'" in stream["found"]
    assert "TOOLFLEET_STREAM" in stream["advice"]


async def _make_stream(url: str, name: str) -> None:
    client = await nats.connect(url)
    await client.jetstream().add_stream(name=name, subjects=[f"{name}.>"])
    await client.close()


def test_a_stream_that_was_lost_is_told_and_accepted(nats_server: EmbeddedNats, valkey_server: EmbeddedValkey) -> None:
    unique = uuid.uuid4().hex[:8]
    env = clean_env(
        NATS_URL=nats_server.url, REDIS_URL=valkey_server.url,
        TOOLFLEET_STREAM=f"LOST_{unique}", TOOLFLEET_SUBJECT_PREFIX=f"lost-{unique}",
        TOOLFLEET_DLQ_STREAM=f"LOSTDLQ_{unique}", TOOLFLEET_DLQ_SUBJECT_PREFIX=f"lostdlq-{unique}",
    )  # fmt: skip
    asyncio.run(_lose_stream(nats_server.url, valkey_server.url, f"LOST_{unique}"))
    doctor = ("doctor", "--json", "--api", "http://127.0.0.1:1")
    lost = checks(toolfleet(*doctor, env=env))["stream and store"]
    assert lost["state"] == "wrong"
    assert "toolfleet doctor --accept-stream" in lost["advice"]
    worker = toolfleet("worker", env=env)
    assert worker.code == FAILED
    assert "toolfleet doctor --accept-stream" in worker.err.splitlines()[-1]
    assert checks(toolfleet(*doctor, "--accept-stream", env=env))["stream and store"]["state"] == "ok"
    assert checks(toolfleet(*doctor, env=env))["stream and store"]["state"] == "ok"


async def _lose_stream(nats_url: str, redis_url: str, name: str) -> None:
    """An empty stream, and a store that remembers another one under its name."""
    import redis.asyncio as redis

    from toolfleet.services.background_jobs.nats_streams import StreamNames, task_stream

    wanted = task_stream(StreamNames(name, name.lower().replace("_", "-"), "unused", "unused"), 1 << 30)
    client = await nats.connect(nats_url)
    reply = await client.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(wanted).encode(), timeout=5)
    assert "error" not in json.loads(reply.data)
    await client.close()
    async with redis.from_url(redis_url) as store:
        await store.set(f"tf:stream:{name}", "2020-01-01T00:00:00Z")
