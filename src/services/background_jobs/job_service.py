"""The one door to jobs, for API, nodes and command line: submit, get, result, events, cancel, reopen, stats."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

from toolfleet.services.background_jobs.dead_letters import DeadLetters
from toolfleet.services.background_jobs.errors import JobExpired, JobNotFound, QueueError, StoreUnavailable
from toolfleet.services.background_jobs.event_reader import StreamItem, read_events
from toolfleet.services.background_jobs.job_control import CancelReceipt, JobControl, JobView
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.ports import (
    EventFeed,
    JobPage,
    JobStore,
    StoreStats,
    ToolCatalogue,
    ToolSpec,
    WorkerInfo,
)
from toolfleet.services.background_jobs.queue_ports import JobQueue, QueueStats
from toolfleet.services.background_jobs.reopening import Reopening
from toolfleet.services.background_jobs.submission import Submission, Submitter
from toolfleet.services.background_jobs.task_models import (
    DEFAULT_TENANT,
    JobEvent,
    JobRecord,
    Status,
    TaskDefinition,
    Tier,
    ToolResult,
)


class JobService:
    """Jobs for every transport."""

    def __init__(
        self,
        *,
        store: JobStore,
        queue: JobQueue,
        feed: EventFeed,
        catalogue: ToolCatalogue,
        submitter: Submitter,
        letters: DeadLetters,
    ) -> None:
        self._store = store
        self._queue = queue
        self._feed = feed
        self._catalogue = catalogue
        self._submitter = submitter
        self._control = JobControl(store, queue, feed, self.get)
        self._reopening = Reopening(store, queue, letters.box, self.get)
        self.letters = letters
        """What needs a person: list, show, redrive, discard."""

    async def submit(
        self, new: NewJob, *, tenant: str = DEFAULT_TENANT, idempotency_key: str | None = None, known_key: bool = True
    ) -> Submission:
        """Accept a job. Arguments and errors as `Submitter.submit`."""
        return await self._submitter.submit(new, tenant=tenant, idempotency_key=idempotency_key, known_key=known_key)

    async def cancel(self, job_id: str, *, tenant: str = DEFAULT_TENANT, reason: str = "requested") -> CancelReceipt:
        """Stop a job, and say how far that got. Errors as `JobControl.cancel`."""
        return await self._control.cancel(job_id, tenant=tenant, reason=reason)

    async def retry(self, job_id: str, *, tenant: str = DEFAULT_TENANT, reason: str = "retry", by: str = "") -> JobView:
        """Run what did not succeed again. Errors as `Reopening.retry`."""
        return await self._reopening.retry(job_id, tenant=tenant, reason=reason, by=by)

    async def resolve(
        self,
        job_id: str,
        tool_call_id: str,
        decision: Literal["rerun", "completed", "failed"],
        *,
        result: Any = None,
        note: str = "",
        by: str = "",
        tenant: str = DEFAULT_TENANT,
    ) -> JobView:
        """Decide one call of an unknown job; `by` is who says so. Errors as `Reopening.resolve`."""
        return await self._reopening.resolve(
            job_id, tool_call_id, decision, result=result, note=note, by=by, tenant=tenant
        )

    async def get(self, job_id: str, tenant: str = DEFAULT_TENANT) -> JobView:
        """A job as it is now.

        Raises:
            JobNotFound: there is none of this id and tenant; `JobExpired` where there was one.
            StoreUnavailable: Redis is down and the stream does not hold it: its state can't be told.
            QueueUnavailable: there is no record, and NATS is down: whether the stream holds it can't be told.
        """
        try:
            record = await self._store.get(job_id)
        except StoreUnavailable:
            found = await self._in_stream(job_id)
            if found is None:
                raise
            return JobView(None, _owned(found, tenant), degraded=True)
        if record is None:
            # A job that was accepted while Redis was down is known to the stream alone: this raises where it is down.
            found = await self._queue.find(job_id)
            if found is not None:
                return JobView(None, _owned(found, tenant))
            # Between the two looks a worker may have recorded it, finished and acked it.
            record = await self._store.get(job_id)
        if record is not None:
            _owned(record.task, tenant)
            return JobView(record, None)
        if await self._store.expired(job_id):
            raise JobExpired(f"job {job_id} ended, and its result is no longer kept", job_id=job_id)
        raise JobNotFound(f"there is no job {job_id}; its result may have expired", job_id=job_id)

    async def _in_stream(self, job_id: str) -> TaskDefinition | None:
        try:
            return await self._queue.find(job_id)
        except QueueError:
            return None

    async def wait(self, job_id: str, seconds: float, tenant: str = DEFAULT_TENANT) -> JobView:
        """The job once something has changed, or as it is when the time is up. Raises as `get`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        async with self._feed.watch(job_id) as watch:
            first = view = await self.get(job_id, tenant)
            # A wake-up may only say that something could have been missed.
            while _place(view) == _place(first) and (left := until - loop.time()) > 0:
                if view.record is not None and view.record.status.terminal:
                    break
                await watch.changed(left)
                view = await self.get(job_id, tenant)
        return view

    async def wait_until_over(self, job_id: str, tenant: str = DEFAULT_TENANT) -> JobRecord:
        """The record of a job once it is terminal. Bound it with `asyncio.timeout`. Raises as `get`."""
        async with contextlib.aclosing(self.events(job_id, tenant=tenant, heartbeat_s=5.0)) as events:
            async for _ in events:
                pass
        view = await self.get(job_id, tenant)
        if view.record is None:
            raise StoreUnavailable("Redis went away while the job ended; ask again")
        return view.record

    async def results(self, record: JobRecord) -> Mapping[str, ToolResult]:
        """The stored results of a job by tool_call_id, also the partial ones of a failed or cancelled job."""
        return await self._store.results(record.job_id)

    async def recent_events(self, record: JobRecord, count: int = 10) -> Sequence[JobEvent]:
        """The last events of a job's log."""
        return await self._store.events(record.job_id, max(0, record.last_event - count), count)

    def events(
        self,
        job_id: str,
        *,
        after: int = 0,
        tenant: str = DEFAULT_TENANT,
        heartbeat_s: float = 15.0,
    ) -> AsyncGenerator[StreamItem, None]:
        """The events of a job after an id: each once and in order, to the terminal one of this generation.

        Yields `JobEvent`, `Gap` where the log was trimmed, and `Pulse` at each heartbeat. Raises as `get`.
        """
        return read_events(
            self._store, self._feed, job_id, after=after, heartbeat_s=heartbeat_s,
            check=lambda: self.get(job_id, tenant),
        )  # fmt: skip

    async def jobs(
        self, *, tenant: str = DEFAULT_TENANT, status: Status | None, tier: Tier | None, cursor: str | None, limit: int
    ) -> JobPage:
        """A page of jobs, newest first."""
        return await self._store.jobs(tenant, status, tier, cursor, limit)

    async def tools(self) -> Sequence[ToolSpec]:
        """What the fleet can call."""
        return await self._catalogue.tools()

    async def workers(self) -> Sequence[WorkerInfo]:
        """The workers that are alive."""
        return await self._store.workers()

    async def stats(self) -> tuple[StoreStats, QueueStats | None, Sequence[WorkerInfo]]:
        """Figures of store, queue (None where it is down) and workers."""
        store, workers = await asyncio.gather(self._store.stats(), self._store.workers())
        try:
            queue = await self._queue.stats()
        except QueueError:
            queue = None
        return store, queue, workers


def _owned(task: TaskDefinition, tenant: str) -> TaskDefinition:
    """A job of another tenant is not there."""
    if task.tenant != tenant:
        raise JobNotFound(f"there is no job {task.job_id}", job_id=task.job_id)
    return task


def _place(view: JobView) -> int:
    """How far a job's log has come, as far as it is known."""
    return view.record.last_event if view.record is not None else 0
