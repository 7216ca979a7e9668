"""The API is killed while clients stream, and comes up again at the same address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.api.harness import JOBS, Frame, Toolbox, call, frames, running_worker
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_service
from toolfleet.services.background_jobs.job_request import NewCall, NewJob
from toolfleet.services.background_jobs.task_models import Status
from toolfleet.services.embedded.process import ChildProcess
from toolfleet.services.embedded.server import HOST, free_ports
from toolfleet.settings import Settings

ROOT = Path(__file__).parents[2]
BOUND_S = 40.0
CLIENTS = 12
KILLS = 2
STEPS = 4
"""Events that the job tells before each kill, and again while the API is away."""

_SERVE = """
import sys
from toolfleet.api.serve import serve
from toolfleet.settings import Settings
serve(Settings(), port=int(sys.argv[1]))
"""
_NAMES = (
    "stream",
    "subject_prefix",
    "dlq_stream",
    "dlq_subject_prefix",
    "stream_max_bytes",
    "dlq_max_bytes",
    "ack_wait",
)


@dataclass
class ApiProcess:
    """The API in a process of its own, with an address that stays."""

    settings: Settings
    log: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    """For its environment, besides those of the settings."""
    port: int = field(default_factory=lambda: free_ports(1)[0])
    up: asyncio.Event = field(default_factory=asyncio.Event)
    _process: ChildProcess | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    async def start(self) -> None:
        settings = self.settings
        assert settings.nats_url is not None
        assert settings.redis_url is not None
        told = {f"TOOLFLEET_{name.upper()}": str(getattr(settings, name)) for name in _NAMES}
        urls = {"NATS_URL": settings.nats_url.get_secret_value(), "REDIS_URL": settings.redis_url.get_secret_value()}
        command = [sys.executable, "-c", _SERVE, str(self.port)]
        process = self._process = ChildProcess(
            command, ROOT, self.log, env={**os.environ, **told, **urls, **self.variables}
        )

        async def answers() -> bool:
            assert process.running, process.log_tail()
            with contextlib.suppress(httpx.TransportError):
                return (await client.get("/health/live")).status_code == httpx.codes.OK
            return False

        async with httpx.AsyncClient(base_url=self.url) as client:
            await wait_until(answers, "the API answers", timeout=BOUND_S)
        self.up.set()

    async def kill(self) -> None:
        self.up.clear()
        if self._process is not None:
            await self._process.kill()


@pytest.fixture
async def api(own_settings: Settings, tmp_path: Path) -> AsyncIterator[ApiProcess]:
    process = ApiProcess(own_settings, tmp_path / "api.log")
    await process.start()
    yield process
    await process.kill()


class Reader:
    """A client as browsers are: it comes back with the last id that it has seen until the stream has its end."""

    def __init__(self, api: ApiProcess, job_id: str) -> None:
        self._api = api
        self._path = f"{JOBS}/{job_id}/stream"
        self.told: list[Frame] = []
        self.connections = 0

    async def follow(self) -> None:
        async with httpx.AsyncClient(base_url=self._api.url, timeout=BOUND_S) as client:
            while not self.told or self.told[-1].event != "job.completed":
                await self._api.up.wait()
                with contextlib.suppress(httpx.TransportError):
                    await self._read(client)

    async def _read(self, client: httpx.AsyncClient) -> None:
        headers = {"Last-Event-ID": str(self.told[-1].id)} if self.told else {}
        async with client.stream("GET", self._path, headers=headers) as response:
            assert response.status_code == httpx.codes.OK, await response.aread()
            self.connections += 1
            async for frame in frames(response):
                if frame.event is not None:
                    self.told.append(frame)


@pytest.mark.promise("G7")
async def test_clients_of_an_api_that_is_killed_come_back_and_see_every_event_once(
    api: ApiProcess, own_settings: Settings
) -> None:
    tools = Toolbox()
    async with open_service(own_settings, tools=tools.runner) as wired, running_worker(own_settings, tools):
        job_id = (await wired.service.submit(NewJob(tools=[NewCall.model_validate(call("step"))]))).job_id

        async def told(count: int) -> bool:
            record = (await wired.service.get(job_id)).record
            return record is not None and record.last_event >= count

        # What a reader has at the start: queued, started, tool.started.
        events = 3
        await wait_until(lambda: told(events), "the tool runs")
        readers = [Reader(api, job_id) for _ in range(CLIENTS)]
        async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.follow())
            for _ in range(KILLS):
                for _ in range(STEPS):
                    events += 1
                    tools.steps.put_nowait(f"step {events}")
                    await wait_until(lambda count=events: told(count), f"event {events} is told")  # type: ignore[misc]
                await wait_until(lambda: all(reader.told for reader in readers), "all read")
                await api.kill()
                for _ in range(STEPS):
                    events += 1
                    tools.steps.put_nowait(f"step {events}")
                    await wait_until(lambda count=events: told(count), f"event {events} is told")  # type: ignore[misc]
                await api.start()
            tools.steps.put_nowait(None)
        record = (await wired.service.get(job_id)).record
    assert record is not None
    assert record.status is Status.COMPLETED
    every = [str(number) for number in range(1, record.last_event + 1)]
    for reader in readers:
        assert [frame.id for frame in reader.told] == every
        assert reader.connections > KILLS
