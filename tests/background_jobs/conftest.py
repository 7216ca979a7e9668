"""Parts on the session's servers, and fixtures that fail a test for what it leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import nats
import nats.js.errors
import pytest
from redis import Redis

from tests.background_jobs.dumping import leaks
from tests.conftest import SettingsFactory
from toolfleet.bootstrap import redis_client
from toolfleet.services.background_jobs.redis_state_manager import RedisStateManager
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

SMALL: dict[str, object] = {
    # The embedded server has 4 GiB for the reservations of all streams.
    "stream_max_bytes": 1 << 24,
    "dlq_max_bytes": 1 << 24,
    "retry_delays": (0.01,),
    "retry_jitter": 0.0,
    "drain_timeout": 4.0,
    # A test that needs the reconciler calls it.
    "recovery_check_interval": 3600.0,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaves_open_jobs: jobs that have not ended may be left in Redis")
    config.addinivalue_line("markers", "leaves_messages: messages may be left in the task stream")


@pytest.fixture
def made_settings() -> list[Settings]:
    """Every `Settings` that the test has made: whose streams are to be looked at, and removed."""
    return []


@pytest.fixture
def make_settings(make_settings: SettingsFactory, made_settings: list[Settings]) -> SettingsFactory:
    """As everywhere, with small streams and short delays."""

    def make(**overrides: object) -> Settings:
        settings = make_settings(**(SMALL | overrides))
        made_settings.append(settings)
        return settings

    return make


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """A plain client, to look at what is stored."""
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
async def store(settings: Settings, redis_url: str) -> AsyncIterator[RedisStateManager]:
    """The store alone."""
    async with redis_client(settings, redis_url) as client:
        yield RedisStateManager(client, timeout_s=5, log_max=1000, result_ttl_s=86400, max_starts=3)


@pytest.fixture
async def own_nats(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    """A server that a test may kill, pause and restart."""
    async with EmbeddedNats(tmp_path / "nats", durable=False) as server:
        yield server


@pytest.fixture
async def own_valkey(tmp_path: Path) -> AsyncIterator[EmbeddedValkey]:
    """A server that a test may kill, pause and restart."""
    async with EmbeddedValkey(tmp_path / "valkey", durable=False) as server:
        yield server


@pytest.fixture
def own_settings(make_settings: SettingsFactory, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey) -> Settings:
    """On servers of the test's own, with short bounds."""
    return make_settings(
        nats_url=own_nats.url, redis_url=own_valkey.url, redis_timeout=0.5, publish_timeout=0.5, ack_wait=2.0
    )


@pytest.fixture(autouse=True)
async def nothing_left_behind(request: pytest.FixtureRequest, made_settings: list[Settings]) -> AsyncIterator[None]:
    """No task runs on, no key stays for ever, no message waits for nobody."""
    before = asyncio.all_tasks()
    yield
    tasks = {task for task in asyncio.all_tasks() - before - {asyncio.current_task()} if not task.done()}
    problems = [f"the task {task.get_name()} still runs" for task in tasks]
    if "redis_url" in request.fixturenames:
        open_jobs = request.node.get_closest_marker("leaves_open_jobs") is not None
        with Redis.from_url(request.getfixturevalue("valkey_server").url, decode_responses=True) as client:
            problems += [f"the key {key} has no TTL" for key in leaks(client, open_jobs_are_fine=open_jobs)]
    if "nats_url" in request.fixturenames:
        left = await _streams_left(request.getfixturevalue("nats_server").url, made_settings)
        if request.node.get_closest_marker("leaves_messages") is None:
            problems += left
    assert not problems, "; ".join(problems)


async def _streams_left(url: str, made: list[Settings]) -> list[str]:
    found = []
    client = await nats.connect(url)
    try:
        manager = client.jsm()
        for settings in made:
            for name in (settings.stream, settings.dlq_stream):
                try:
                    info = await manager.stream_info(name)
                except nats.js.errors.NotFoundError:
                    continue
                if name == settings.stream and info.state.messages:
                    found.append(f"{info.state.messages} messages stand in {name}")
                await manager.delete_stream(name)
    finally:
        await client.close()
    return found
