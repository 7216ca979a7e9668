"""The one door to jobs, for API, nodes and command line: submit, get, result, events, cancel, reopen, stats."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import structlog

from toolfleet.services.background_jobs.errors import (
    IdempotencyConflict,
    IllegalMove,
    JobExpired,
    JobNotFound,
    QueueError,
    QueueFull,
    QueueUnavailable,
    StoreUnavailable,
)
from toolfleet.services.background_jobs.event_reader import StreamItem, read_events
from toolfleet.services.background_jobs.job_request import NewJob, make_task
from toolfleet.services.background_jobs.ports import (
    DeadLetterPage,
    EventFeed,
    Granted,
    JobPage,
    JobQueue,
    JobStore,
    QueueStats,
    ReopenAnswer,
    StoreStats,
    ToolCatalogue,
    ToolSpec,
    WorkerInfo,
)
from toolfleet.services.background_jobs.sync_runs import SyncRunner
from toolfleet.services.background_jobs.task_models import (
    DEFAULT_TENANT,
    ErrorInfo,
    EventType,
    JobRecord,
    Status,
    TaskDefinition,
    Tier,
    ToolCall,
    ToolResult,
    derived_job_id,
    new_job_id,
)

log = structlog.get_logger(__name__)

QUEUE_UNAVAILABLE: Final = "Queue unavailable"
"""The `fallback_reason` of a synchronous run that replaced the queue (G12)."""
CANCEL_RECEIPT_S: Final = 1.0
"""How long a cancel waits for the worker's word (G8)."""
REOPEN_TRIES: Final = 3


class ArgumentCheck(Protocol):
    """Raises `InvalidArguments` where arguments do not fit a tool's schema."""

    def __call__(self, spec: ToolSpec, arguments: Mapping[str, Any]) -> None:
        """Check one call."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may be, and what it gets where it says nothing."""

    max_calls: int
    max_bytes: int
    max_retries: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Submission:
    """What became of a submit."""

    task: TaskDefinition
    record: JobRecord | None
    """None where the store could not be asked: the job is accepted all the same."""
    created: bool
    """False where the job was there already."""
    ran: bool = False
    """Whether it ran synchronously; the record, or `results` where there is none, tells how it went."""
    fallback_reason: str | None = None
    results: Mapping[str, ToolResult] | None = None
    """Of a run that could not be recorded: queue and store were down."""
    error: ErrorInfo | None = None

    @property
    def job_id(self) -> str:
        """Its id."""
        return self.task.job_id


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is known at this moment."""

    record: JobRecord | None
    task: TaskDefinition | None
    """Set where the store is down and the stream still holds the job: it is queued or running."""
    degraded: bool = False


@dataclass(frozen=True, slots=True)
class CancelReceipt:
    """How far a cancel got."""

    outcome: Literal["cancelled", "cancelling", "already_cancelled", "ended"]
    reached: Literal["queued", "requested", "worker", "tool"]
    status: Status
    still_running: Sequence[str] = ()
    """Calls whose tool was told and has not stopped."""
    worker: str | None = None


class JobService:
    """Jobs for every transport."""

    def __init__(
        self,
        *,
        store: JobStore,
        queue: JobQueue,
        feed: EventFeed,
        catalogue: ToolCatalogue,
        check_arguments: ArgumentCheck,
        sync_runs: SyncRunner | None,
        limits: Limits,
    ) -> None:
        self._store = store
        self._queue = queue
        self._feed = feed
        self._catalogue = catalogue
        self._check_arguments = check_arguments
        self._sync = sync_runs
        self._limits = limits

    # -- submit ------------------------------------------------------------------------------------------------

    async def submit(
        self, new: NewJob, *, tenant: str = DEFAULT_TENANT, idempotency_key: str | None = None, known_key: bool = True
    ) -> Submission:
        """Accept a job: published and acked by the stream, or run synchronously.

        Args:
            new: what is asked for.
            tenant: whose job it is.
            idempotency_key: the same key with the same job gives the same job (G6).
            known_key: False for a key made a moment ago, which no job can have yet.

        Raises:
            InvalidTask: refused, nothing was queued; its subclasses say why.
            QueueFull: the stream is at its limit.
            QueueUnavailable: no ack; `maybe_stored` says whether the job may have been accepted.
            ToolUnavailable: the tools can't be checked, since no tool server was ever reached.
        """
        job_id = derived_job_id(tenant, idempotency_key) if idempotency_key else new_job_id()
        task = self._task(new, job_id, tenant)
        if idempotency_key and known_key and (standing := await self._standing(task)):
            return standing
        await self._check(task.tools)
        if new.mode == "sync":
            return await self._run_now(task, None, never_published=True)
        try:
            published = await self._queue.publish(task)
        except QueueUnavailable as error:
            error.details["job_id"] = job_id
            if new.fallback != "sync":
                raise
            # A key that the caller brought may have been published by an earlier submit.
            fresh = not (idempotency_key and known_key)
            return await self._run_now(task, QUEUE_UNAVAILABLE, never_published=fresh and not error.maybe_stored)
        if published == "stored":
            return await self._enqueue(task, created=True)
        return await self._already(task, published)

    def _task(self, new: NewJob, job_id: str, tenant: str) -> TaskDefinition:
        return make_task(
            new,
            job_id,
            tenant=tenant,
            max_calls=self._limits.max_calls,
            max_bytes=self._limits.max_bytes,
            default_retries=self._limits.max_retries,
            default_timeout_s=self._limits.timeout_s,
        )

    async def _check(self, calls: Sequence[ToolCall]) -> None:
        for call in calls:
            try:
                spec = await self._catalogue.find(call.tool_name)
                self._check_arguments(spec, call.tool_args)
            except Exception as error:
                if hasattr(error, "details"):
                    error.details["tool_call_id"] = call.tool_call_id
                raise

    async def _standing(self, task: TaskDefinition) -> Submission | None:
        """The job that this key made before, from the record, or from the stream where the store is down."""
        try:
            record = await self._store.get(task.job_id)
        except StoreUnavailable:
            with contextlib.suppress(QueueUnavailable):
                if found := await self._queue.find(task.job_id):
                    return Submission(_same(task, found), None, created=False)
            return None
        if record is None:
            return None
        return Submission(_same(task, record.task), record, created=False)

    async def _enqueue(self, task: TaskDefinition, *, created: bool) -> Submission:
        """The record of a published task. The publish ack is the promise, so a store that is down changes nothing."""
        try:
            record, _ = await self._store.enqueue(task)
        except StoreUnavailable as error:
            log.warning("submit.record_deferred", job_id=task.job_id, error=str(error))
            return Submission(task, None, created)
        return Submission(_same(task, record.task), record, created and record.generation == task.generation)

    async def _already(self, task: TaskDefinition, published: str) -> Submission:
        """10077, or a duplicate: the stream has the job, or the record tells, or the stream is full."""
        if found := await self._queue.find(task.job_id):
            return await self._enqueue(_same(task, found), created=False)
        record = await self._store.get(task.job_id)
        if record is not None:
            return Submission(_same(task, record.task), record, created=False)
        if published == "refused":
            raise QueueFull("the queue is full; try again later", job_id=task.job_id)
        raise QueueUnavailable(
            "the stream remembers this job but neither holds it nor is there a record; ask again with the same "
            "Idempotency-Key in two minutes",
            maybe_stored=True,
            job_id=task.job_id,
        )

    async def _run_now(self, task: TaskDefinition, reason: str | None, *, never_published: bool) -> Submission:
        if self._sync is None:
            raise QueueUnavailable("this process runs no jobs itself; submit it in mode background", job_id=task.job_id)
        if reason is not None and never_published and not await self._store_answers():
            # Neither a message nor a claim can stand anywhere: nobody else can run it.
            results, failure = await self._sync.run_unrecorded(task)
            return Submission(task, None, True, ran=True, fallback_reason=reason, results=results, error=failure)
        try:
            answer = await self._sync.run(task)
        except StoreUnavailable as error:
            if reason is None:
                raise
            # It may stand in the stream, or its claim in the store although the answer was lost: it must not run twice.
            raise QueueUnavailable(
                "neither queue nor store answer, and the job may have been queued; ask again with the same "
                "Idempotency-Key",
                maybe_stored=True,
                job_id=task.job_id,
            ) from error
        record = await self._store.get(task.job_id)
        ran = isinstance(answer, Granted) and record is not None and record.status.terminal
        return Submission(task, record, isinstance(answer, Granted), ran=ran, fallback_reason=reason)

    async def _store_answers(self) -> bool:
        try:
            await self._store.ping()
        except StoreUnavailable:
            return False
        return True

    # -- read --------------------------------------------------------------------------------------------------

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
        async with self._feed.watch(job_id) as watch:
            view = await self.get(job_id, tenant)
            if view.record is not None and view.record.status.terminal:
                return view
            await watch.changed(seconds)
        return await self.get(job_id, tenant)

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

    async def recent_events(self, record: JobRecord, count: int = 10) -> Sequence[Any]:
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

    async def dead_letters(self, after: int, limit: int) -> DeadLetterPage:
        """What needs a person, oldest first."""
        return await self._queue.dead_letters(after, limit)

    # -- control -----------------------------------------------------------------------------------------------

    async def cancel(self, job_id: str, *, tenant: str = DEFAULT_TENANT, reason: str = "requested") -> CancelReceipt:
        """Step 10; waits up to 1 s for the worker's word.

        Raises:
            JobNotFound: no such job.
            StoreUnavailable: it can't be cancelled now.
        """
        view = await self.get(job_id, tenant)
        async with self._feed.watch(job_id) as watch:
            answer = await self._store.cancel(job_id, reason)
            if answer.found == "absent":
                if view.task is None:
                    raise JobNotFound(f"there is no job {job_id}", job_id=job_id)
                answer = await self._store.cancel(job_id, reason, view.task)
            if answer.found == "already_cancelled":
                return CancelReceipt("already_cancelled", "queued", Status.CANCELLED)
            if answer.found == "ended":
                return CancelReceipt("ended", "queued", answer.status or Status.COMPLETED)
            if answer.found == "cancelled_now":
                await self._purge(job_id)
                return CancelReceipt("cancelled", "queued", Status.CANCELLED)
            return await self._receipt(job_id, watch.changed, answer.worker)

    async def _purge(self, job_id: str) -> None:
        try:
            await self._queue.purge(job_id)
        except QueueError as error:
            # The message meets a terminal record at step 3 and is acked there.
            log.info("cancel.purge_deferred", job_id=job_id, error=str(error))

    async def _receipt(self, job_id: str, changed: Callable[[float], Any], worker: str | None) -> CancelReceipt:
        reached: Literal["requested", "worker"] = "requested"
        loop = asyncio.get_running_loop()
        until = loop.time() + CANCEL_RECEIPT_S
        while (left := until - loop.time()) > 0:
            events = await changed(left)
            for event in events or ():
                if event.type is EventType.JOB_CANCELLING and event.data.get("reached") == "worker":
                    reached = "worker"
                if event.type is EventType.JOB_CANCELLED:
                    far: Literal["worker", "tool"] = "tool" if event.data.get("reached") == "tool" else "worker"
                    left_behind = tuple(str(call) for call in event.data.get("still_running", ()))
                    return CancelReceipt("cancelled", far, Status.CANCELLED, left_behind, worker)
                if event.ends_stream:
                    return CancelReceipt("ended", reached, Status(str(event.data["status"])), (), worker)
        return CancelReceipt("cancelling", reached, Status.RUNNING, (), worker)

    async def retry(self, job_id: str, *, tenant: str = DEFAULT_TENANT, reason: str = "retry") -> JobView:
        """A new generation of a failed or cancelled job: the calls that did not succeed run again (step 11).

        Raises:
            JobNotFound: no such job.
            IllegalMove: it has not failed and was not cancelled.
        """
        await self.get(job_id, tenant)
        answer = await self._store.reopen(job_id, reason)
        return await self._reopened(job_id, tenant, answer)

    async def resolve(
        self,
        job_id: str,
        tool_call_id: str,
        decision: Literal["rerun", "completed", "failed"],
        *,
        result: Any = None,
        note: str = "",
        tenant: str = DEFAULT_TENANT,
    ) -> JobView:
        """A person's word on one call of an unknown job, once.

        Raises:
            JobNotFound: no such job, or it has no such undecided call.
            IllegalMove: the job is not unknown, or the call was decided already.
        """
        view = await self.get(job_id, tenant)
        task = view.record.task if view.record else view.task
        call = next((c for c in task.tools if c.tool_call_id == tool_call_id), None) if task else None
        if call is None:
            raise JobNotFound(f"job {job_id} has no call {tool_call_id}", job_id=job_id)
        decided = _decided(call, decision, result, note) if decision != "rerun" else None
        answer = await self._store.resolve(job_id, tool_call_id, decision, decided, note)
        return await self._reopened(job_id, tenant, answer)

    async def _reopened(self, job_id: str, tenant: str, answer: ReopenAnswer) -> JobView:
        match answer.verdict:
            case "absent":
                raise JobNotFound(f"there is no record of {job_id}", job_id=job_id)
            case "not_allowed":
                status = answer.status.value if answer.status else "?"
                raise IllegalMove(f"job {job_id} is {status}, which does not allow this", status=status)
            case "decided_already":
                raise IllegalMove(f"this call of {job_id} was decided already; a decision counts once")
            case "no_such_call":
                raise IllegalMove(f"the outcome of this call of {job_id} is known; there is nothing to decide")
        if answer.verdict == "reopened" and answer.task is not None:
            await self._publish_again(answer.task)
        return await self.get(job_id, tenant)

    async def _publish_again(self, task: TaskDefinition) -> None:
        """The record stands already; a queue that is down leaves the publish to the reconciler."""
        try:
            for _ in range(REOPEN_TRIES):
                # An old message of the job would take the only place that its subject has.
                await self._queue.purge(task.job_id)
                if await self._queue.publish(task) != "refused":
                    return
            log.warning("reopen.refused", job_id=task.job_id, hint="the queue is full; the reconciler will publish it")
        except QueueError as error:
            log.warning("reopen.publish_deferred", job_id=task.job_id, error=str(error))


def _same(asked: TaskDefinition, standing: TaskDefinition) -> TaskDefinition:
    """The standing task, if the same was asked for (G6)."""
    if asked.body_hash and standing.body_hash and asked.body_hash != standing.body_hash:
        raise IdempotencyConflict(job_id=standing.job_id)
    return standing


def _owned(task: TaskDefinition, tenant: str) -> TaskDefinition:
    """A job of another tenant is not there."""
    if task.tenant != tenant:
        raise JobNotFound(f"there is no job {task.job_id}", job_id=task.job_id)
    return task


def _decided(call: ToolCall, decision: Literal["completed", "failed"], result: Any, note: str) -> ToolResult:
    error = None
    if decision == "failed":
        error = ErrorInfo(code="decided_failed", message=note or "a person decided that this call failed")
    return ToolResult(
        tool_call_id=call.tool_call_id,
        tool_name=call.tool_name,
        status=decision,
        structured_content=result,
        error=error,
    )
