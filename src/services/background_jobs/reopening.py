"""Opens a new generation of a job on a person's word (step 11): retry and resolve; redrive is in `dead_letters`."""

from __future__ import annotations

from typing import Any, Final, Literal

import structlog

from toolfleet.services.background_jobs.errors import CallNotFound, IllegalMove, JobNotFound, QueueError
from toolfleet.services.background_jobs.job_control import Get, JobView
from toolfleet.services.background_jobs.ports import JobStore, ReopenAnswer
from toolfleet.services.background_jobs.queue_ports import DeadLetterBox, JobQueue
from toolfleet.services.background_jobs.task_models import ErrorInfo, Status, TaskDefinition, ToolCall, ToolResult

log = structlog.get_logger(__name__)

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


class Reopening:
    """Retries and resolves."""

    def __init__(self, store: JobStore, queue: JobQueue, letters: DeadLetterBox, get: Get) -> None:
        self._store = store
        self._queue = queue
        self._letters = letters
        self._get = get

    async def retry(self, job_id: str, *, tenant: str, reason: str, by: str) -> JobView:
        """A new generation of a failed or cancelled job: calls without a result, and those that failed, run (step 11).

        Raises:
            JobNotFound: no such job.
            IllegalMove: it has not failed and was not cancelled.
        """
        await self._get(job_id, tenant)
        answer = await self._store.reopen(job_id, reason, by)
        view = await self._reopened(job_id, tenant, answer)
        if answer.verdict == "reopened":
            await self._answer_letters(job_id, answer.generation)
        return view

    async def _answer_letters(self, job_id: str, generation: int) -> None:
        """A job that runs again needs nobody any more; a letter that stays behind is told from its generation."""
        try:
            await drop_letters(self._letters, job_id, before=generation)
        except QueueError as error:
            log.warning("reopen.letters_left", job_id=job_id, error=str(error), hint="discard them")

    async def resolve(
        self,
        job_id: str,
        tool_call_id: str,
        decision: Literal["rerun", "completed", "failed"],
        *,
        result: Any,
        note: str,
        by: str,
        tenant: str,
    ) -> JobView:
        """A person's word on one call of an unknown job, once.

        Raises:
            JobNotFound: no such job.
            CallNotFound: the job has no such call.
            IllegalMove: the job is not unknown, the call's outcome is known, or it was decided already.
        """
        view = await self._get(job_id, tenant)
        task = view.record.task if view.record else view.task
        call = next((c for c in task.tools if c.tool_call_id == tool_call_id), None) if task else None
        if call is None:
            raise CallNotFound(
                f"job {job_id} has no call {tool_call_id}; its undecided_calls are those to decide", job_id=job_id
            )
        decided = _decided(call, decision, result, note) if decision != "rerun" else None
        answer = await self._store.resolve(job_id, tool_call_id, decision, decided, note, by)
        return await self._reopened(job_id, tenant, answer, tool_call_id)

    async def _reopened(self, job_id: str, tenant: str, answer: ReopenAnswer, call: str = "") -> JobView:
        match answer.verdict:
            case "absent":
                raise JobNotFound(f"there is no record of {job_id}", job_id=job_id)
            case "not_allowed":
                raise not_allowed(job_id, answer.status)
            case "decided_already":
                raise IllegalMove(
                    f"{call} of job {job_id} was decided already; a decision counts once", tool_call_id=call
                )
            case "no_such_call":
                raise IllegalMove(
                    f"the outcome of {call} of job {job_id} is known; there is nothing to decide", tool_call_id=call
                )
        if answer.verdict == "reopened" and answer.task is not None:
            await publish_generation(self._queue, answer.task)
        return await self._get(job_id, tenant)


def not_allowed(job_id: str, status: Status | None) -> IllegalMove:
    """The refusal of what a job's status does not allow, with what helps."""
    name = status.value if status else "?"
    return IllegalMove(f"job {job_id} is {name}: {INSTEAD.get(name, 'this is not possible')}", status=name)


async def publish_generation(queue: JobQueue, task: TaskDefinition) -> None:
    """Publish a generation whose record stands; a queue that is down leaves that to the reconciler.

    The message id is the new generation's: the stream would swallow the old one as a duplicate. An old message goes
    first: it would take the only place that the job's subject has, and a late ack would delete what stands there.
    """
    try:
        for _ in range(REOPEN_TRIES):
            await queue.purge(task.job_id)
            if await queue.publish(task) != "refused":
                return
        log.warning("reopen.refused", job_id=task.job_id, hint="the queue is full; the reconciler will publish it")
    except QueueError as error:
        log.warning("reopen.publish_deferred", job_id=task.job_id, error=str(error))


async def drop_letters(box: DeadLetterBox, job_id: str, *, before: int) -> int:
    """Remove a job's letters of the generations before one; how many. Malformed messages under its subject stay."""
    tasks = [(letter, letter.task()) for letter in await box.of_job(job_id)]
    return await box.remove([letter for letter, task in tasks if task is not None and task.generation < before])


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
