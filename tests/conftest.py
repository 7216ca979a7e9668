"""Real servers for the whole session, and settings that no variable of this machine's can change.

The servers are started by fixtures outside any test's event loop and belong to none: a test may use them from its
own. A test that kills, pauses or restarts a server starts one of its own in `tmp_path`.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from pydantic import AliasChoices
from redis import Redis

from toolfleet.services.embedded.consul_agent import EmbeddedConsul, find_consul
from toolfleet.services.embedded.errors import ServerNotInstalled
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.server import EmbeddedServer
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

SettingsFactory = Callable[..., Settings]
AnyServer = TypeVar("AnyServer", bound=EmbeddedServer)


def _running(server: AnyServer) -> Iterator[AnyServer]:
    # In a thread: the first to ask for a server may be a fixture that runs in a test's event loop.
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(lambda: asyncio.run(server.start())).result()
        try:
            yield server
        finally:
            elsewhere.submit(lambda: asyncio.run(server.stop())).result()


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedNats]:
    yield from _running(EmbeddedNats(tmp_path_factory.mktemp("nats"), durable=False))


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    yield from _running(EmbeddedValkey(tmp_path_factory.mktemp("valkey"), durable=False))


@pytest.fixture(scope="session")
def consul_installed() -> None:
    """Skips where Consul is missing, except in CI, which installs it and must not skip what it came to test."""
    try:
        find_consul()
    except ServerNotInstalled as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def consul_agent(consul_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedConsul]:
    yield from _running(EmbeddedConsul(tmp_path_factory.mktemp("consul")))


@pytest.fixture
def nats_url(nats_server: EmbeddedNats) -> str:
    """Of the session's server. Streams of other tests may be there: use the names in `settings`."""
    return nats_server.url


@pytest.fixture
def redis_url(valkey_server: EmbeddedValkey) -> str:
    """Of the session's server, emptied: no key of an earlier test is left. Functions stay loaded."""
    with Redis.from_url(valkey_server.url) as client:
        client.flushall()
    return valkey_server.url


@pytest.fixture(autouse=True)
def no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every variable that `Settings` or a Consul client reads out of the environment."""
    for name in list(os.environ):
        if name.startswith(("TOOLFLEET_", "CONSUL_")) or name in _settings_variables():
            monkeypatch.delenv(name)


def _settings_variables() -> set[str]:
    aliases = (field.validation_alias for field in Settings.model_fields.values())
    choices = (alias.choices if isinstance(alias, AliasChoices) else [alias] for alias in aliases)
    return {name for names in choices for name in names if isinstance(name, str)}


@pytest.fixture
def make_settings(tmp_path: Path) -> SettingsFactory:
    """Settings from keyword arguments alone, with stream names of the test's own: `make_settings(concurrency=2)`."""

    def make(**overrides: object) -> Settings:
        unique = uuid.uuid4().hex[:12]
        names: dict[str, object] = {
            "stream": f"TASKS_{unique}",
            "subject_prefix": f"tasks-{unique}",
            "dlq_stream": f"DLQ_{unique}",
            "dlq_subject_prefix": f"dlq-{unique}",
            # A stream reserves its size for the whole session, of the 4 GB that the session's server has.
            "stream_max_bytes": 4 << 20,
            "dlq_max_bytes": 1 << 20,
            "state_dir": tmp_path / "run",
        }
        return Settings.model_validate(names | overrides)

    return make


@pytest.fixture
def settings(make_settings: SettingsFactory, nats_url: str, redis_url: str) -> Settings:
    """Settings that point at the session's servers."""
    return make_settings(nats_url=nats_url, redis_url=redis_url)
