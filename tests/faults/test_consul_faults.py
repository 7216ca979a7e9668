"""Consul is killed, and comes back with an empty catalogue, while a service and a worker know nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import SettingsFactory
from tests.discovery.conftest import Catalogue
from tests.support.waiting import wait_until
from tests.tool_execution.raw_http import Exchange, RawServer, raw_server
from toolfleet.bootstrap import open_core, open_service, open_worker
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.task_models import JobRecord, Status, Tier
from toolfleet.services.discovery.models import DiscoveryError, ServiceNotFound
from toolfleet.services.embedded.consul_agent import EmbeddedConsul
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

BOUND_S = 30.0
TOOL = "greet"


async def answer(exchange: Exchange) -> None:
    """One tool, by hand: what is told apart here is which server was asked."""
    if exchange.message["method"] == "tools/list":
        tool = {"name": TOOL, "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": True}}
        await exchange.result({"tools": [tool], "resultType": "complete", "ttlMs": 0, "cacheScope": "public"})
    else:
        await exchange.result({"content": [{"type": "text", "text": "well"}], "resultType": "complete"})


@dataclass
class Scene:
    """An agent, what is registered there, and a service and a worker that were started with nothing but its address."""

    agent: EmbeddedConsul
    settings: Settings
    nats: EmbeddedNats
    valkey: EmbeddedValkey
    service: JobService | None = None
    _catalogues: list[Catalogue] = field(default_factory=list)

    async def register(self, tools: RawServer) -> None:
        """Queue, store and a tool server, as their own programs would again after the catalogue is gone."""
        catalogue = Catalogue(self.agent)
        self._catalogues.append(catalogue)
        meta = {"stream": self.settings.stream, "subject_prefix": self.settings.subject_prefix}
        await catalogue.register("nats-grpc-service", self.nats.port, meta=meta)
        await catalogue.register("redis-grpc-service", self.valkey.port)
        await catalogue.register("greeter", tools.port, tags=["mcp"])

    async def close(self) -> None:
        for catalogue in self._catalogues:
            await catalogue.leave()

    async def submit(self) -> str:
        assert self.service is not None
        call = {"tool_name": f"greeter/{TOOL}", "tool_call_id": "c1"}
        return (await self.service.submit(NewJob.model_validate({"tools": [call], "max_retries": 20}))).job_id

    async def submit_in_vain(self) -> str | None:
        """A job that waits because its tool can't be found; None where it ended."""
        job_id = await self.submit()

        async def seen() -> JobRecord | None:
            record = await self.record(job_id)
            return record if record.status.terminal or record.retries else None

        record = await wait_until(seen, "the job is over, or waits for its next attempt")
        assert record is not None
        return None if record.status.terminal else job_id

    async def over(self, job_id: str) -> JobRecord:
        assert self.service is not None
        async with asyncio.timeout(BOUND_S):
            return await self.service.wait_until_over(job_id)

    async def record(self, job_id: str) -> JobRecord:
        assert self.service is not None
        record = (await self.service.get(job_id)).record
        assert record is not None
        return record


@pytest.fixture
async def scene(
    consul_installed: None,
    make_settings: SettingsFactory,
    nats_server: EmbeddedNats,
    valkey_server: EmbeddedValkey,
    redis_url: str,
    tmp_path: Path,
) -> AsyncIterator[Scene]:
    async with EmbeddedConsul(tmp_path / "consul") as agent:
        settings = make_settings(consul_http_addr=agent.address, retry_delays=(0.2,), retry_jitter=0.0)
        scene = Scene(agent, settings, nats_server, valkey_server)
        try:
            yield scene
        finally:
            await scene.close()


@contextlib.asynccontextmanager
async def running(scene: Scene) -> AsyncIterator[None]:
    """The service and a worker."""
    async with open_service(scene.settings) as wired, open_worker(scene.settings, Tier.NORMAL) as worker:
        scene.service = wired.service
        working = asyncio.create_task(worker.run(), name="worker")
        try:
            yield
        finally:
            worker.stop()
            async with asyncio.timeout(BOUND_S):
                assert await working == 0


async def starts(settings: Settings) -> None:
    """As a new process does."""
    async with open_core(settings, name="another"):
        pass


async def test_who_runs_goes_on_without_consul_and_who_starts_says_what_is_missing(scene: Scene) -> None:
    async with raw_server(answer) as tools, raw_server(answer) as moved:
        await scene.register(tools)
        async with running(scene):
            assert (await scene.over(await scene.submit())).status is Status.COMPLETED

            await scene.agent.kill()
            # Twice the age at which the registry's answer is asked for again, so that the last one has to serve.
            for count in (2, 3):
                record = await scene.over(await scene.submit())
                assert (record.status, record.retries) == (Status.COMPLETED, 0)
                await wait_until(lambda count=count: calls(tools) >= count, "the tool server was asked")  # type: ignore[misc]
            with pytest.raises(DiscoveryError, match=scene.agent.address):
                await starts(scene.settings)

            await scene.agent.start()
            with pytest.raises(ServiceNotFound, match=r"no passing instance of 'redis-grpc-service'.*REDIS_URL"):
                await starts(scene.settings)

            # The tool server is registered nowhere. Workers notice it with a call or two, and from then on send none.
            job_id = await wait_until(scene.submit_in_vain, "a call finds no server")
            assert job_id is not None
            sent = calls(tools)

            await scene.register(moved)
            record = await scene.over(job_id)
            assert record.status is Status.COMPLETED
            assert (calls(tools), calls(moved)) == (sent, 1)
            await starts(scene.settings)


def calls(server: RawServer) -> int:
    """Calls that have reached it."""
    return sum(message["method"] == "tools/call" for message in server.calls)
