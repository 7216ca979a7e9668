"""What is said of the servers' writes, from what they tell."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from toolfleet.services.background_jobs.durability import (
    Durability,
    nats_varz,
    queue_durability,
    store_durability,
    store_evicts,
    tell_durability,
)
from toolfleet.services.embedded.nats_server import EmbeddedNats


@pytest.mark.parametrize(
    ("info", "durable"),
    [
        ({"appendonly": "yes", "appendfsync": "always"}, True),
        ({"appendonly": "yes", "appendfsync": "everysec"}, False),
        ({"appendonly": "no", "appendfsync": "always"}, False),
        ({"version": "9"}, None),
    ],
)
def test_redis(info: Mapping[str, str], durable: bool | None) -> None:
    found = store_durability(info)
    assert found.durable is durable
    assert bool(found.advice) is (durable is not True)


@pytest.mark.parametrize(
    ("varz", "durable"),
    [
        ({"jetstream": {"config": {"sync_interval": 120_000_000_000, "sync_always": True}}}, True),
        ({"jetstream": {"config": {"sync_interval": 120_000_000_000}}}, False),
        ({"jetstream": {}}, None),
        ({}, None),
        (None, None),
    ],
)
def test_nats(varz: Mapping[str, object] | None, durable: bool | None) -> None:
    assert queue_durability(varz).durable is durable


def test_how_long_nats_waits_is_said() -> None:
    varz = {"jetstream": {"config": {"sync_interval": 120_000_000_000}}}
    assert queue_durability(varz).found == "sync_interval: 120 s"


def test_a_redis_that_drops_jobs() -> None:
    assert store_evicts({"maxmemory-policy": "allkeys-lru"}) == "allkeys-lru"
    assert store_evicts({"maxmemory-policy": "noeviction"}) is None
    assert store_evicts({}) is None


@pytest.mark.parametrize("durable", [True, False])
async def test_a_real_server_tells_it_on_its_monitoring_port(tmp_path: Path, durable: bool) -> None:
    async with EmbeddedNats(tmp_path, durable=durable, monitoring=True) as server:
        assert queue_durability(await nats_varz(server.monitoring_url, 5)).durable is durable


async def test_a_monitoring_that_does_not_answer_is_not_known() -> None:
    with capture_logs() as logs:
        assert await nats_varz("http://127.0.0.1:1", 1) is None
    assert logs[0]["event"] == "nats.monitoring_failed"


async def test_only_what_is_surely_not_durable_is_warned_of() -> None:
    async def ask() -> list[Durability]:
        await asyncio.sleep(0)
        return [
            Durability("Redis", False, "found", "advice"),
            Durability("NATS", None, "?"),
            Durability("X", True, "!"),
        ]

    with capture_logs() as logs:
        await tell_durability(ask)
    assert [(entry["event"], entry["server"], entry["advice"]) for entry in logs] == [
        ("writes.not_durable", "Redis", "advice")
    ]
