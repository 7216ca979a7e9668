"""Servers of each test's own, since it ends, stops or cuts them off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import SettingsFactory
from tests.faults.scene import LEASE_S, Scene, open_scene
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings


@pytest.fixture
async def own_nats(tmp_path: Path) -> AsyncIterator[EmbeddedNats]:
    async with EmbeddedNats(tmp_path / "nats", durable=False) as server:
        yield server


@pytest.fixture
async def own_valkey(tmp_path: Path) -> AsyncIterator[EmbeddedValkey]:
    async with EmbeddedValkey(tmp_path / "valkey", durable=False) as server:
        yield server


@pytest.fixture
def own_settings(make_settings: SettingsFactory, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey) -> Settings:
    """On the test's servers, with short leases and bounds, and room for a large message or two."""
    return make_settings(
        nats_url=own_nats.url,
        redis_url=own_valkey.url,
        lease=LEASE_S,
        ack_wait=LEASE_S,
        redis_timeout=0.5,
        publish_timeout=0.5,
        retry_delays=(0.05,),
        retry_jitter=0.0,
        recovery_check_interval=1.0,
        drain_timeout=4.0,
        stream_max_bytes=1 << 26,
        dlq_max_bytes=1 << 24,
    )


@pytest.fixture
async def scene(own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey) -> AsyncIterator[Scene]:
    """A service beside the servers; the workers that a test opens stand behind proxies."""
    async with open_scene(own_settings, own_nats, own_valkey) as scene:
        yield scene


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    """Fails a test after which a task of its own still runs."""
    before = asyncio.all_tasks()
    yield
    tasks = {task for task in asyncio.all_tasks() - before - {asyncio.current_task()} if not task.done()}
    assert not tasks, "; ".join(f"the task {task.get_name()} still runs" for task in tasks)
