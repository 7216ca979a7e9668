"""Synchronous runs in the caller's own process: an attempt like any other, without a message."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from toolfleet.services.background_jobs.attempt import Attempt, AttemptRules
from toolfleet.services.background_jobs.ports import (
    Changes,
    ClaimAnswer,
    Granted,
    Lease,
    MarkAnswer,
    ToolRunner,
    WriteAnswer,
)
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_executor import JobExecutor
from toolfleet.services.background_jobs.task_lease import Held
from toolfleet.services.background_jobs.task_models import ErrorInfo, TaskDefinition, ToolCall, ToolResult
from toolfleet.services.background_jobs.transitions import Completed, Failed, Retry, Unknown, unknown


class SyncRunner:
    """Runs jobs while their caller waits, a bounded number at once."""

    def __init__(self, executor: JobExecutor, runner: ToolRunner, rules: AttemptRules, *, at_once: int) -> None:
        self._executor = executor
        self._runner = runner
        self._rules = rules
        self._slots = asyncio.Semaphore(at_once)
        self._runs: set[asyncio.Task[ClaimAnswer]] = set()

    async def run(self, task: TaskDefinition) -> ClaimAnswer:
        """Claim and run. The run is a task of its own: a caller who goes away does not end it.

        Raises:
            StoreUnavailable: there was no claim, so nothing ran.
        """
        run = asyncio.create_task(self._run(task), name=f"sync:{task.job_id}")
        self._runs.add(run)
        run.add_done_callback(self._runs.discard)
        return await asyncio.shield(run)

    async def _run(self, task: TaskDefinition) -> ClaimAnswer:
        async with self._slots:
            return await self._executor.run_now(task)

    async def run_unrecorded(self, task: TaskDefinition) -> tuple[Mapping[str, ToolResult], ErrorInfo | None]:
        """Run a task that surely stands nowhere else, with neither queue nor store: the results, and why it failed."""
        store = _NoStore()
        granted = Granted(task.job_id, task.generation, 1, task.max_retries, task.timeout_ms, {}, frozenset())
        gate = StoreGate(store.ping)
        attempt = Attempt(task, granted, store=store, gate=gate, runner=self._runner, rules=self._rules)
        async with self._slots:
            outcome, changes = await attempt.run(Held(attempt, float("inf")))
        results = {r.tool_call_id: r for r in (*store.results, *changes.results)}
        match outcome:
            case Completed():
                return results, None
            case Failed(error=error) | Retry(error=error):
                return results, error
            case Unknown(calls=calls):
                return results, unknown(task.job_id, calls).error
            case _:
                return results, ErrorInfo(code="broken", message="the run broke off; its results so far are kept")


class _NoStore:
    """Takes what an attempt writes where there is no store; nobody else can hold such a job."""

    def __init__(self) -> None:
        self.results: list[ToolResult] = []

    async def ping(self) -> None:
        """Always there."""

    async def mark_start(self, lease: Lease, call: ToolCall, lease_ms: int) -> MarkAnswer:
        return "ok"

    async def withdraw_mark(self, lease: Lease, tool_call_id: str) -> WriteAnswer:
        return "ok"

    async def progress(self, lease: Lease, changes: Changes, wseq: int) -> WriteAnswer:
        self.results += changes.results
        return "ok"
