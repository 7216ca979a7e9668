"""What a person changes about a job that is there: cancel (step 10) and reopen (step 11)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import structlog

from toolfleet.services.background_jobs.errors import IllegalMove, JobNotFound, QueueError, StoreUnavailable
from toolfleet.services.background_jobs.event_reader import Replay
from toolfleet.services.background_jobs.ports import EventFeed, JobQueue, JobStore, ReopenAnswer, Watch
from toolfleet.services.background_jobs.task_models import (
    ErrorInfo,
    EventType,
    JobEvent,
    JobRecord,
    Status,
    TaskDefinition,
    ToolCall,
    ToolResult,
)

log = structlog.get_logger(__name__)

CANCEL_RECEIPT_S: Final = 1.0
"""How long a cancel waits for the worker's word (G8)."""
REOPEN_TRIES: Final = 3
INSTEAD: Final = {
    Status.QUEUED.value: "it will run; cancel it if it should not",
    Status.RUNNING.value: "wait for its end, or cancel it",
    Status.COMPLETED.value: "every call has a result, so there is nothing to run or to decide",
    Status.FAILED.value: "no outcome is unknown; POST …/retry runs what failed",
    Status.CANCELLED.value: "no outcome is unknown; POST …/retry runs what was not done",
    Status.UNKNOWN.value: "decide the calls whose outcome is not known with POST …/resolve",
}
"""What helps where a job's status does not allow what was asked."""


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


Get = Callable[[str, str], Awaitable[JobView]]
"""``(job_id, tenant)``; raises `JobNotFound` where the tenant has no such job."""


class JobControl:
    """Cancels and reopens."""

    def __init__(self, store: JobStore, queue: JobQueue, feed: EventFeed, get: Get) -> None:
        self._store = store
        self._queue = queue
        self._feed = feed
        self._get = get

    async def cancel(self, job_id: str, *, tenant: str, reason: str) -> CancelReceipt:
        """Step 10; waits up to 1 s for the worker's word.

        Raises:
            JobNotFound: no such job.
            StoreUnavailable: it can't be cancelled now.
        """
        view = await self._get(job_id, tenant)
        async with self._feed.watch(job_id) as watch:
            answer = await self._store.cancel(job_id, reason)
            if answer.found == "absent":
                if view.task is None:
                    raise JobNotFound(f"there is no job {job_id}", job_id=job_id)
                answer = await self._store.cancel(job_id, reason, view.task)
            if answer.found == "already_cancelled":
                return await self._earlier_receipt(job_id, view)
            if answer.found == "ended":
                return CancelReceipt("ended", "queued", answer.status or Status.COMPLETED)
            if answer.found == "cancelled_now":
                await self._purge(job_id)
                return CancelReceipt("cancelled", "queued", Status.CANCELLED)
            told = view.record.last_event if view.record is not None else 0
            return await self._receipt(job_id, watch, told, answer.worker)

    async def _earlier_receipt(self, job_id: str, view: JobView) -> CancelReceipt:
        """How far the cancel got that ended the job, as its last event tells."""
        last = await self._store.events(job_id, max(0, view.record.last_event - 1)) if view.record else ()
        data = last[-1].data if last and last[-1].type is EventType.JOB_CANCELLED else {}
        far = data.get("reached")
        reached: Literal["queued", "worker", "tool"] = "tool" if far == "tool" else "worker" if far else "queued"
        still = data.get("still_running")
        left_behind = tuple(map(str, still)) if isinstance(still, list) else ()
        return CancelReceipt("already_cancelled", reached, Status.CANCELLED, left_behind)

    async def _purge(self, job_id: str) -> None:
        try:
            await self._queue.purge(job_id)
        except QueueError as error:
            # The message meets a terminal record at step 3 and is acked there.
            log.info("cancel.purge_deferred", job_id=job_id, error=str(error))

    async def _receipt(self, job_id: str, watch: Watch, told: int, worker: str | None) -> CancelReceipt:
        reached: Literal["requested", "worker"] = "requested"
        replay = Replay(told)
        loop = asyncio.get_running_loop()
        until = loop.time() + CANCEL_RECEIPT_S
        while (left := until - loop.time()) > 0:
            for event in await self._news(job_id, watch, replay, left):
                if event.type is EventType.JOB_CANCELLING and event.data.get("reached") == "worker":
                    reached = "worker"
                if event.type is EventType.JOB_CANCELLED:
                    far: Literal["worker", "tool"] = "tool" if event.data.get("reached") == "tool" else "worker"
                    still = event.data.get("still_running")
                    left_behind = tuple(map(str, still)) if isinstance(still, list) else ()
                    return CancelReceipt("cancelled", far, Status.CANCELLED, left_behind, worker)
                if event.ends_stream:
                    return CancelReceipt("ended", reached, Status(str(event.data["status"])), (), worker)
        return CancelReceipt("cancelling", reached, Status.RUNNING, (), worker)

    async def _news(self, job_id: str, watch: Watch, replay: Replay, seconds: float) -> Sequence[JobEvent]:
        """A job's next events; none where the time is up."""
        events = await watch.changed(seconds)
        if events is not None and not (events and replay.fits(events)):
            # Some were missed, as before the first connection was up.
            with contextlib.suppress(StoreUnavailable):
                events = await self._store.events(job_id, replay.last)
        return [item for item in replay.take(events or ()) if isinstance(item, JobEvent)]

    async def retry(self, job_id: str, *, tenant: str, reason: str) -> JobView:
        """A new generation of a failed or cancelled job: the calls that did not succeed run again (step 11).

        Raises:
            JobNotFound: no such job.
            IllegalMove: it has not failed and was not cancelled.
        """
        await self._get(job_id, tenant)
        answer = await self._store.reopen(job_id, reason)
        return await self._reopened(job_id, tenant, answer)

    async def resolve(
        self,
        job_id: str,
        tool_call_id: str,
        decision: Literal["rerun", "completed", "failed"],
        *,
        result: Any,
        note: str,
        tenant: str,
    ) -> JobView:
        """A person's word on one call of an unknown job, once.

        Raises:
            JobNotFound: no such job, or it has no such undecided call.
            IllegalMove: the job is not unknown, or the call was decided already.
        """
        view = await self._get(job_id, tenant)
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
                raise IllegalMove(
                    f"job {job_id} is {status}: {INSTEAD.get(status, 'this is not possible')}", status=status
                )
            case "decided_already":
                raise IllegalMove(f"this call of {job_id} was decided already; a decision counts once")
            case "no_such_call":
                raise IllegalMove(f"the outcome of this call of {job_id} is known; there is nothing to decide")
        if answer.verdict == "reopened" and answer.task is not None:
            await self._publish_again(answer.task)
        return await self._get(job_id, tenant)

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
