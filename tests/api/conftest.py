"""An API and a worker on the session's servers; servers of their own for tests that take one away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.api.harness import Toolbox, running_api, running_worker
from tests.conftest import SettingsFactory
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings


@pytest.fixture
async def tools() -> Toolbox:
    return Toolbox()


@pytest.fixture
def api_settings(make_settings: SettingsFactory, nats_url: str, redis_url: str) -> Settings:
    return make_settings(nats_url=nats_url, redis_url=redis_url, retry_delays=(0.05,), retry_jitter=0.0)


@pytest.fixture
async def client(api_settings: Settings, tools: Toolbox) -> AsyncIterator[httpx.AsyncClient]:
    """Of an API without a worker: what is submitted stays queued, unless the test asks for `worker` too."""
    async with running_api(api_settings, tools) as client:
        yield client


@pytest.fixture
async def worker(api_settings: Settings, tools: Toolbox) -> AsyncIterator[None]:
    async with running_worker(api_settings, tools):
        yield


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
    """On servers that the test may take away; short bounds, since it waits for them."""
    return make_settings(
        nats_url=own_nats.url,
        redis_url=own_valkey.url,
        redis_timeout=1.0,
        publish_timeout=1.0,
        retry_delays=(0.05,),
        retry_jitter=0.0,
    )
