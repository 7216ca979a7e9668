"""Cancels a job that is there, and tells how far that got (step 10)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import structlog

from toolfleet.services.background_jobs.errors import JobNotFound, QueueError, StoreUnavailable
from toolfleet.services.background_jobs.event_reader import Replay
from toolfleet.services.background_jobs.ports import EventFeed, JobStore, Watch
from toolfleet.services.background_jobs.queue_ports import JobQueue
from toolfleet.services.background_jobs.task_models import (
    EventType,
    JobEvent,
    JobRecord,
    Status,
    TaskDefinition,
)
from toolfleet.services.background_jobs.transitions import CallStop, StoppedCall

log = structlog.get_logger(__name__)

CANCEL_RECEIPT_S: Final = 1.0
"""How long a cancel waits for the worker's word (G8)."""


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is known at this moment."""

    record: JobRecord | None
    task: TaskDefinition | None
    """Set where the store is down and the stream still holds the job: it is queued or running."""
    degraded: bool = False


Reached = Literal["queued", "requested", "worker", "tool"]


@dataclass(frozen=True, slots=True)
class CancelReceipt:
    """How far a cancel got."""

    outcome: Literal["cancelled", "cancelling", "already_cancelled", "ended"]
    reached: Reached
    """`queued`: it was not running. `requested`: its worker has not answered yet. `worker`: that has stopped it, with
    no tool to tell or none that could be told. `tool`: a tool's server was told."""
    status: Status
    calls: Sequence[StoppedCall] = ()
    """Every call of the job, and how far it got there."""
    worker: str | None = None

    @property
    def still_running(self) -> Sequence[str]:
        """Calls whose tool may still be running."""
        return [call.tool_call_id for call in self.calls if call.state.may_run]


Get = Callable[[str, str], Awaitable[JobView]]
"""``(job_id, tenant)``; raises `JobNotFound` where the tenant has no such job."""


class JobControl:
    """Cancels."""

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
                return await self._earlier_receipt(job_id)
            if answer.found == "ended":
                return CancelReceipt("ended", "queued", answer.status or Status.COMPLETED)
            if answer.found == "cancelled_now":
                await self._purge(job_id)
                return CancelReceipt("cancelled", "queued", Status.CANCELLED, _calls(answer.told))
            told = view.record.last_event if view.record is not None else 0
            receipt = await self._receipt(job_id, watch, told, answer.worker)
        if receipt.outcome == "cancelling" and view.record is not None:
            return replace(receipt, calls=await self._calls_so_far(view.record))
        return receipt

    async def _earlier_receipt(self, job_id: str) -> CancelReceipt:
        """How far the cancel got that ended the job, as its last event tells."""
        record = await self._store.get(job_id)
        last = await self._store.events(job_id, max(0, record.last_event - 1)) if record is not None else ()
        data = last[-1].data if last and last[-1].type is EventType.JOB_CANCELLED else {}
        return CancelReceipt("already_cancelled", _reached(data), Status.CANCELLED, _calls(data))

    async def _calls_so_far(self, record: JobRecord) -> Sequence[StoppedCall]:
        """While the worker has not told how far it got, all that has no result may be running."""
        try:
            stored = await self._store.results(record.job_id)
        except StoreUnavailable:
            stored = {}
        return [
            StoppedCall(
                call.tool_call_id,
                call.tool_name,
                CallStop.ENDED if call.tool_call_id in stored else CallStop.NOT_TOLD,
            )
            for call in record.task.tools
        ]

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
                    data = event.data
                    return CancelReceipt("cancelled", _reached(data), Status.CANCELLED, _calls(data), worker)
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


def _reached(data: Mapping[str, Any]) -> Reached:
    """Of a `job.cancelled` event; one of an older version does not tell of a queued job."""
    far = data.get("reached")
    return far if far in ("queued", "requested", "worker", "tool") else "queued"


def _calls(data: Mapping[str, Any]) -> Sequence[StoppedCall]:
    """Of a `job.cancelled` event; none in one of an older version."""
    return [
        StoppedCall(str(call["tool_call_id"]), str(call["tool_name"]), CallStop(call["state"]))
        for call in data.get("calls", ())
    ]
