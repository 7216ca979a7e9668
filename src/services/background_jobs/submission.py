"""Step 1: from what a client asks for to a job that is promised, or to a refusal before anything is queued."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from toolfleet.services.background_jobs.admission import Admission
from toolfleet.services.background_jobs.errors import (
    IdempotencyConflict,
    InvalidTask,
    QueueFull,
    QueueUnavailable,
    StoreUnavailable,
    ToolfleetError,
)
from toolfleet.services.background_jobs.job_request import NewJob, make_task
from toolfleet.services.background_jobs.ports import Granted, JobStore, ToolCatalogue, ToolSpec
from toolfleet.services.background_jobs.queue_ports import JobQueue
from toolfleet.services.background_jobs.sync_runs import SyncRunner
from toolfleet.services.background_jobs.task_models import (
    ErrorInfo,
    JobRecord,
    Millis,
    TaskDefinition,
    ToolCall,
    ToolResult,
    derived_job_id,
    new_job_id,
)

log = structlog.get_logger(__name__)

QUEUE_UNAVAILABLE: Final = "Queue unavailable"
"""The `fallback_reason` of a synchronous run that replaced the queue (G12)."""


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


class Submitter:
    """Accepts jobs."""

    def __init__(
        self,
        *,
        store: JobStore,
        queue: JobQueue,
        catalogue: ToolCatalogue,
        check_arguments: ArgumentCheck,
        sync_runs: SyncRunner | None,
        limits: Limits,
        admission: Admission,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._queue = queue
        self._catalogue = catalogue
        self._check_arguments = check_arguments
        self._sync = sync_runs
        self._limits = limits
        self._admission = admission
        self._clock = clock

    async def submit(self, new: NewJob, *, tenant: str, idempotency_key: str | None, known_key: bool) -> Submission:
        """Accept a job: published and acked by the stream, or run synchronously.

        Args:
            new: what is asked for.
            tenant: whose job it is.
            idempotency_key: the same key with the same job gives the same job (G6).
            known_key: False for a key made a moment ago, which no job can have yet.

        Raises:
            InvalidTask: refused, nothing was queued; its subclasses say why.
            QueueFull: the job's tier or the stream is at its limit, and there is no such job yet.
            QueueUnavailable: no ack; `maybe_stored` says whether the job may have been accepted.
            ToolUnavailable: the tools can't be checked, since no tool server was ever reached.
        """
        job_id = derived_job_id(tenant, idempotency_key) if idempotency_key else new_job_id()
        task = self._task(new, job_id, tenant)
        if idempotency_key and known_key and (standing := await self._standing(task)):
            return standing
        _check_expiry(task, int(self._clock() * 1000))
        await self._check(task.tools)
        if new.mode == "sync":
            return await self._run_now(task, None, never_published=True)
        try:
            if (found := await self._admitted(task, may_stand=bool(idempotency_key) and known_key)) is not None:
                return await self._enqueue(_same(task, found), created=False)
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
            except ToolfleetError as error:
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

    async def _admitted(self, task: TaskDefinition, *, may_stand: bool) -> TaskDefinition | None:
        """None where the queue has room. Where it has none, the same job that is in it already.

        Raises:
            QueueFull: neither.
        """
        try:
            await self._admission.check(task)
        except QueueFull as error:
            error.details["job_id"] = task.job_id
            # It may have been accepted while the store was down: its record is made later.
            found = await self._queue.find(task.job_id) if may_stand else None
            if found is None:
                raise
            return found
        return None

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
            raise self._admission.full(task.priority, task.job_id)
        raise QueueUnavailable(
            "the stream remembers this job but neither holds it nor is there a record; ask again with the same "
            "Idempotency-Key in two minutes",
            maybe_stored=True,
            job_id=task.job_id,
        )

    async def _run_now(self, task: TaskDefinition, reason: str | None, *, never_published: bool) -> Submission:
        if self._sync is None:
            raise QueueUnavailable("this process runs no jobs itself; submit it in mode background", job_id=task.job_id)
        if reason is not None and never_published and not await self._store_answers(task.job_id):
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
        if record is not None:
            task = _same(task, record.task)
        ran = isinstance(answer, Granted) and record is not None and record.status.terminal
        return Submission(task, record, isinstance(answer, Granted), ran=ran, fallback_reason=reason)

    async def _store_answers(self, job_id: str) -> bool:
        try:
            # Not a ping, which would ask a store that is known to be silent once more, and make every caller wait.
            await self._store.get(job_id)
        except StoreUnavailable:
            return False
        return True


def _check_expiry(task: TaskDefinition, now: Millis) -> None:
    """Raises `InvalidTask` where the job could never start. Only of a new job: one that stands may have ended since."""
    if task.expires_at is not None and task.expires_at <= now + task.delay_ms:
        when = "before the delay is over" if task.expires_at > now else "over already"
        raise InvalidTask(f"expires_at is {when}, so the job could never start", path="$.expires_at")


def _same(asked: TaskDefinition, standing: TaskDefinition) -> TaskDefinition:
    """The standing task, if the same was asked for (G6)."""
    if asked.body_hash and standing.body_hash and asked.body_hash != standing.body_hash:
        raise IdempotencyConflict(job_id=standing.job_id)
    return standing
