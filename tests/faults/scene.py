"""A fleet whose connections a test cuts, jobs whose streams are watched from the first event, and what must hold.

Times are scaled: leases and acks last `LEASE_S` where a fleet in operation has 30 s, and a long fault lasts for
`LONG_LEASES` of them, where issue 3 names 20, 30 and 60 s. Those lengths are run by `make chaos`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import SecretStr

from tests.background_jobs.harness import Bench, running_worker
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until
from toolfleet.bootstrap import Core, Tools, open_service
from toolfleet.services.background_jobs.errors import QueueUnavailable, StoreUnavailable
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.task_models import Gap, JobEvent, JobRecord, Status
from toolfleet.services.background_jobs.task_worker import TaskWorker
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.server import HOST
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

LEASE_S = 1.5
LONG_LEASES = 3
PULSE_S = 0.5
"""Heartbeat of the watchers, which is when a reader looks at the log again after a push got lost."""
BOUND_S = 40.0
"""For everything to be over after a fault; it only bounds a failing test."""

CUTS: dict[str, dict[str, bool]] = {
    "both directions": {},
    "what the worker sends": {"to_client": False},
    "what the worker is sent": {"to_server": False},
}
"""Arguments of `TcpProxy.cut`, by what is lost."""


@dataclass
class Watcher:
    """Somebody who has a job's stream open from its beginning to its end."""

    job_id: str
    events: list[JobEvent] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    _open: bool = False

    async def watch(self, service: JobService) -> None:
        """To the end. A stream that could not be opened is asked for again; one that was open stays open."""
        while True:
            try:
                return await self._follow(service)
            except StoreUnavailable:
                if self._open:
                    raise

    async def _follow(self, service: JobService) -> None:
        stream = service.events(self.job_id, heartbeat_s=PULSE_S)
        async with contextlib.aclosing(stream) as items:
            async for item in items:
                self._open = True
                if isinstance(item, JobEvent):
                    self.events.append(item)
                elif isinstance(item, Gap):
                    self.gaps.append(item)

    def kinds(self) -> list[str]:
        return [event.type.value for event in self.events]


@dataclass
class Scene:
    """Own servers, a proxy before each, a service and what it has accepted."""

    settings: Settings
    nats: EmbeddedNats
    valkey: EmbeddedValkey
    nats_proxy: TcpProxy
    redis_proxy: TcpProxy
    service: JobService
    core: Core
    bench: Bench
    jobs: dict[str, str] = field(default_factory=dict)
    """Ids by the name of the job, which is that of its only call as well."""
    watchers: dict[str, Watcher] = field(default_factory=dict)
    _watching: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def worker(self, *, proxied: bool = True, name: str = "w1") -> AsyncIterator[TaskWorker]:
        """A worker, behind the proxies or not; it must live to the end, and leave with 0."""
        settings = self.proxied if proxied else self.settings
        async with running_worker(settings.model_copy(update={"worker_name": name}), self.bench) as worker:
            yield worker

    @property
    def proxied(self) -> Settings:
        """As `settings`, with the proxies' addresses."""
        return self.settings.model_copy(
            update={
                "nats_url": SecretStr(f"nats://{self.nats_proxy.host}:{self.nats_proxy.port}"),
                "redis_url": SecretStr(f"redis://{self.redis_proxy.host}:{self.redis_proxy.port}/0"),
            }
        )

    # -- jobs ------------------------------------------------------------------------------------------------------

    async def submit(self, name: str, tool: str, args: dict[str, Any] | None = None, **fields: Any) -> str:
        """A job of one call, watched from now on; raises as `JobService.submit`. Repeated, it is the same job."""
        call = {"tool_name": tool, "tool_args": args or {}, "tool_call_id": name}
        new = NewJob.model_validate({"tools": [call]} | fields)
        submission = await self.service.submit(new, idempotency_key=name)
        self.jobs[name] = submission.job_id
        watcher = self.watchers.setdefault(name, Watcher(submission.job_id))
        self._watching[name] = asyncio.create_task(watcher.watch(self.service), name=f"watcher of {name}")
        return submission.job_id

    async def insist(self, name: str, tool: str, args: dict[str, Any] | None = None, **fields: Any) -> str:
        """As a client that asks again, with its key, until it has its 202."""

        async def accepted() -> str | None:
            try:
                return await self.submit(name, tool, args, **fields)
            except QueueUnavailable:
                return None

        job_id = await wait_until(accepted, f"{name} is accepted", timeout=BOUND_S)
        assert job_id is not None
        return job_id

    async def begun(self, *names: str) -> None:
        """Until the first attempt of each is in its call."""
        for name in names:
            await wait_until(partial(self.bench.started.__contains__, f"{name}:1"), f"{name} has begun")

    async def record(self, name: str) -> JobRecord:
        """Its record, as soon as the store can be asked."""
        found = await wait_until(partial(self._stored, name), f"{name} has a record", timeout=BOUND_S)
        assert found is not None
        return found

    async def becomes(self, name: str, status: Status) -> JobRecord:
        """The record once it has this status."""

        async def reached() -> JobRecord | None:
            record = await self._stored(name)
            return record if record is not None and record.status is status else None

        found = await wait_until(reached, f"{name} is {status}", timeout=BOUND_S)
        assert found is not None
        return found

    async def _stored(self, name: str) -> JobRecord | None:
        try:
            return await self.core.store.get(self.jobs[name])
        except StoreUnavailable:
            return None

    async def over(self, name: str) -> None:
        """Until its stream has told its end."""
        try:
            async with asyncio.timeout(BOUND_S):
                await self._watching[name]
        except TimeoutError:
            raise AssertionError(
                f"the stream of {name} has no end: {self.watchers[name].kinds()}; {await self.record(name)}; "
                f"{self.bench.started=}"
            ) from None

    async def all_over(self) -> dict[str, JobRecord]:
        """Until every accepted job has ended; then what must hold after any fault.

        No stream lacks an event or has one twice, no call that must not run twice began twice, and nothing is left
        in the queue. The records, by name.
        """
        for name in self.jobs:
            await self.over(name)
        records = {name: await self.record(name) for name in self.jobs}
        for name, record in records.items():
            watcher = self.watchers[name]
            assert record.status.terminal, f"{name} is {record.status}"
            assert not watcher.gaps, f"{name} lacks events: {watcher.gaps}"
            told = [event.id for event in watcher.events]
            assert told == list(range(1, record.last_event + 1)), f"{name} was told {watcher.events}"
        for call in {entry.rpartition(":")[0] for entry in self.bench.started}:
            if call.startswith("once"):
                starts = [entry for entry in self.bench.started if entry.startswith(f"{call}:")]
                assert len(starts) == 1, f"ran more than once: {starts}"

        async def empty() -> bool:
            return (await self.core.queue.stats()).messages == 0

        await wait_until(empty, "the stream is empty", timeout=BOUND_S)
        return records

    async def works_again(self) -> None:
        """A new job is accepted and ends well, without any help."""
        await self.insist("fresh", "echo")
        assert (await self.becomes("fresh", Status.COMPLETED)).starts == 1


async def long_time(leases: float = LONG_LEASES) -> None:
    """What happens in so many leases: nothing that a test could wait for."""
    clock = asyncio.get_running_loop().time
    over = clock() + leases * LEASE_S
    await wait_until(lambda: clock() >= over, f"{leases} leases are over", timeout=leases * LEASE_S + 10)


@contextlib.asynccontextmanager
async def open_scene(
    settings: Settings, nats: EmbeddedNats, valkey: EmbeddedValkey, *, proxied: bool = False, tools: Tools | None = None
) -> AsyncIterator[Scene]:
    """A scene without workers; with `proxied` its service stands behind the proxies as well."""
    bench = Bench()
    async with contextlib.AsyncExitStack() as stack:
        nats_proxy = await stack.enter_async_context(TcpProxy(HOST, nats.port))
        redis_proxy = await stack.enter_async_context(TcpProxy(HOST, valkey.port))
        stack.callback(bench.gate.set)
        scene = Scene(settings, nats, valkey, nats_proxy, redis_proxy, None, None, bench)  # type: ignore[arg-type]
        wired = await stack.enter_async_context(
            open_service(scene.proxied if proxied else settings, tools=tools or bench.runner())
        )
        scene.service, scene.core = wired.service, wired.core
        stack.push_async_callback(_end, scene)
        yield scene


async def _end(scene: Scene) -> None:
    for watching in scene._watching.values():
        watching.cancel()
    await asyncio.gather(*scene._watching.values(), return_exceptions=True)
