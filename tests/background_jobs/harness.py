"""A service and workers in this process, on real servers, with tools that a test steers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.waiting import wait_until
from toolfleet.bootstrap import Core, open_service, open_worker
from toolfleet.services.background_jobs.errors import (
    StoreUnavailable,
    ToolConnectionLost,
    ToolFailure,
    ToolRejected,
    ToolServerFailed,
    ToolUnavailable,
)
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.background_jobs.task_models import JobEvent, JobRecord, Status, Tier, ToolCall, ToolResult
from toolfleet.services.background_jobs.task_worker import TaskWorker
from toolfleet.services.tool_execution.local_runner import LocalTool, LocalToolRunner
from toolfleet.settings import Settings

FAILURES: dict[str, type[ToolFailure]] = {
    "server": ToolServerFailed,
    "lost": ToolConnectionLost,
    "unsent": ToolUnavailable,
    "rejected": ToolRejected,
}


STRICT: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


@dataclass
class Bench:
    """Tools and what became of their calls. Each has a twin, ``once_…``, that must not run twice."""

    started: list[str] = field(default_factory=list)
    """``<tool_call_id>:<attempt>`` of every call, as its function began."""
    stopped: list[str] = field(default_factory=list)
    """``<tool_call_id>`` of every call that was cancelled."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """What `hold` waits for."""
    lookup: asyncio.Event = field(default_factory=asyncio.Event)
    """What finding a tool waits for; set from the beginning."""
    session: asyncio.Event = field(default_factory=asyncio.Event)
    """What a call waits for before it is sent, as for a session with a tool server; set from the beginning."""
    waiting: int = 0
    """Calls that have waited for it."""
    looking: int = 0
    at_once: int = 0
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.lookup.set()
        self.session.set()

    async def echo(self, args: dict[str, Any], context: CallContext) -> dict[str, Any]:
        self._began(context)
        return args

    async def hold(self, args: dict[str, Any], context: CallContext) -> str:
        """Until the gate opens; reports progress first."""
        self._began(context)
        context.on_progress(1, 2, "holding")
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.stopped.append(_call(context))
            raise
        finally:
            self.at_once -= 1
        return "held"

    async def stubborn(self, args: dict[str, Any], context: CallContext) -> str:
        """As `hold`, but it does not stop when it is told."""
        self._began(context)
        while not self.gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.gate.wait()
        return "stubborn"

    async def fail(self, args: dict[str, Any], context: CallContext) -> str:
        """Fails as ``how`` says, for the first ``times`` attempts."""
        self._began(context)
        if context.attempt <= args.get("times", 1000):
            raise FAILURES[args["how"]]("as it was told")
        return "at last"

    async def complain(self, args: dict[str, Any], context: CallContext) -> ToolResult:
        """The tool's own word that it failed."""
        self._began(context)
        return ToolResult(tool_call_id="", tool_name="", status="failed", is_error=True)

    def _began(self, context: CallContext) -> None:
        self.started.append(f"{_call(context)}:{context.attempt}")

    def runner(self) -> LocalToolRunner:
        tools = {}
        for function in (self.echo, self.hold, self.stubborn, self.fail, self.complain):
            name = function.__name__
            tools[name] = (ToolSpec(name, "local", name, repeatable=True), function)
            tools[f"once_{name}"] = (ToolSpec(f"once_{name}", "local", name), function)
        tools["strict"] = (ToolSpec("strict", "local", "strict", input_schema=STRICT, repeatable=True), self.echo)
        return BenchRunner(self, tools)


class BenchRunner(LocalToolRunner):
    """Finds tools as slowly as the bench says."""

    def __init__(self, bench: Bench, tools: Mapping[str, tuple[ToolSpec, LocalTool]]) -> None:
        super().__init__(tools)
        self._bench = bench

    async def describe(self, tool_name: str) -> ToolSpec:
        self._bench.looking += 1
        await self._bench.lookup.wait()
        return await super().describe(tool_name)

    async def run(self, spec: ToolSpec, call: ToolCall, context: CallContext) -> ToolResult:
        self._bench.waiting += 1
        await self._bench.session.wait()
        return await super().run(spec, call, context)


def _call(context: CallContext) -> str:
    return context.idempotency_key.partition(":")[2]


@dataclass
class Fleet:
    """What a test works with."""

    settings: Settings
    service: JobService
    core: Core
    bench: Bench
    workers: list[TaskWorker] = field(default_factory=list)

    async def submit(self, *tools: str | tuple[str, dict[str, Any]], **fields: Any) -> str:
        """A job of the named tools; its id."""
        return (await self.service.submit(job(*tools, **fields))).job_id

    async def over(self, job_id: str) -> JobRecord:
        """The record once the job has ended."""
        async with asyncio.timeout(15):
            return await self.service.wait_until_over(job_id)

    async def record(self, job_id: str) -> JobRecord:
        found = await self.core.store.get(job_id)
        assert found is not None, f"{job_id} has no record"
        return found

    async def reaches(self, job_id: str, status: Status) -> JobRecord:
        """The record once it has this status."""

        async def reached() -> JobRecord | None:
            try:
                record = await self.core.store.get(job_id)
            except StoreUnavailable:
                # A moment after an outage: the probe has not asked yet.
                return None
            return record if record is not None and record.status is status else None

        found = await wait_until(reached, f"{job_id} is {status}")
        assert found is not None
        return found

    async def log(self, job_id: str) -> list[JobEvent]:
        return list(await self.core.store.events(job_id))

    async def kinds(self, job_id: str) -> list[str]:
        return [event.type.value for event in await self.log(job_id)]

    async def began(self, call: str) -> None:
        await wait_until(lambda: call in self.bench.started, f"{call} has begun")

    async def queue_is_empty(self) -> None:
        """Until every message is acked."""

        async def empty() -> bool:
            return (await self.core.queue.stats()).messages == 0

        await wait_until(empty, "the stream is empty")


def job(*tools: str | tuple[str, dict[str, Any]], **fields: Any) -> NewJob:
    """A request; calls are named ``c1``, ``c2``, …"""
    calls = []
    for number, tool in enumerate(tools, 1):
        name, args = (tool, {}) if isinstance(tool, str) else tool
        calls.append({"tool_name": name, "tool_args": args, "tool_call_id": f"c{number}"})
    return NewJob.model_validate({"tools": calls} | fields)


@contextlib.asynccontextmanager
async def open_fleet(
    settings: Settings, *, workers: int = 1, tier: Tier = Tier.NORMAL, runs_jobs: bool = False
) -> AsyncIterator[Fleet]:
    """A service with so many workers; all drain at the end, so a test that leaves a call running opens its gate."""
    bench = Bench()
    async with contextlib.AsyncExitStack() as stack:
        # Last of all: what does not stop when it is told must not outlive a test that failed.
        stack.callback(bench.gate.set)
        wired = await stack.enter_async_context(open_service(settings, tools=bench.runner(), runs_jobs=runs_jobs))
        fleet = Fleet(settings, wired.service, wired.core, bench)
        for number in range(workers):
            named = settings.model_copy(update={"worker_name": f"w{number + 1}"})
            fleet.workers.append(await stack.enter_async_context(running_worker(named, bench, tier)))
        yield fleet


@contextlib.asynccontextmanager
async def running_worker(settings: Settings, bench: Bench, tier: Tier = Tier.NORMAL) -> AsyncIterator[TaskWorker]:
    """A worker that works, and that is drained at the end."""
    async with open_worker(settings, tier, tools=bench.runner()) as worker:
        run = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            async with asyncio.timeout(30):
                assert await run == 0
