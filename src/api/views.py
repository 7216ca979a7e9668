"""From records to answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi import Response
from pydantic import BaseModel

from toolfleet.api.models import CallResult, Event, Job, JobResult, JobStatus, JobSummary, Progress
from toolfleet.services.background_jobs.job_control import JobView
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.submission import Submission
from toolfleet.services.background_jobs.task_models import (
    JobEvent,
    JobRecord,
    Millis,
    Status,
    TaskDefinition,
    ToolCall,
    ToolResult,
    iso_time,
)

JOBS_PATH = "/api/v1/jobs"


class Views:
    """Makes answers; knows how the API is reached from outside."""

    def __init__(self, public_url: str | None) -> None:
        self._prefix = (public_url or "").rstrip("/")

    def job_url(self, job_id: str) -> str:
        """Where a job is polled."""
        return f"{self._prefix}{JOBS_PATH}/{job_id}"

    def links(self, job_id: str, generation: int, status: JobStatus) -> dict[str, object]:
        """The fields of `JobLinks`."""
        url = self.job_url(job_id)
        return {
            "job_id": job_id,
            "task_id": f"{job_id}:{generation}",
            "status": status,
            "poll_url": url,
            "result_url": f"{url}/result",
            "sse_url": f"{url}/stream",
            "cancel_url": f"{url}/cancel",
        }

    def view_links(self, view: JobView) -> dict[str, object]:
        """The fields of `JobLinks` of a job as it is known at this moment."""
        if view.record is not None:
            return self.links(view.record.job_id, view.record.generation, view.record.status)
        task = _task_of(view)
        return self.links(task.job_id, task.generation, _status_without_record(view))

    def summary(self, record: JobRecord) -> JobSummary:
        """A job from its record."""
        return JobSummary.model_validate(self._of_record(record))

    def job(self, view: JobView, events: Sequence[JobEvent]) -> Job:
        """A job as it is known at this moment, with the last entries of its log."""
        fields = self._of_record(view.record) if view.record is not None else self._of_task(view)
        return Job.model_validate({**fields, "recent_events": [event_of(event) for event in events]})

    def unrecorded(self, submission: Submission) -> Job:
        """A job that ran while neither queue nor store could be reached: nobody else will ever know it."""
        task, results = submission.task, submission.results or {}
        failed = submission.error is not None or any(result.status != "completed" for result in results.values())
        status = Status.FAILED if failed else Status.COMPLETED
        fields = self._of_task(JobView(None, task, degraded=True))
        progress = _progress(task, status.value, 100.0 if not failed else 0.0, results)
        return Job.model_validate(
            fields
            | self.links(task.job_id, task.generation, status)
            | {"attempt": 1, "progress": progress, "error": submission.error, "recent_events": []}
        )

    def _of_record(self, record: JobRecord) -> dict[str, object]:
        task = record.task
        return {
            **self.links(record.job_id, record.generation, record.status),
            "priority": task.priority,
            "generation": record.generation,
            "attempt": record.fence,
            "retries": record.retries,
            "max_retries": task.max_retries,
            "created_at": _iso(record.created_at),
            "started_at": _iso(record.started_at),
            "finished_at": _iso(record.finished_at),
            "next_attempt_at": _iso(record.next_attempt_at),
            "expires_at": _iso(task.expires_at),
            "worker": record.worker,
            "cancel_requested": record.cancel_requested,
            "progress": Progress(
                # What the last attempt was at says nothing once it has ended.
                stage=record.stage if record.stage and record.status is Status.RUNNING else record.status.value,
                # Results that an earlier attempt or generation has left count from the start of the next one.
                percent=min(100.0, max(0.0, record.percent, 100 * record.completed_calls / len(task.tools))),
                message=record.message,
                total_tools=len(task.tools),
                completed_tools=record.completed_calls,
                failed_tools=record.failed_calls,
                current_tool=record.current_tool,
            ),
            "error": record.error,
            "output_available": record.status.terminal,
            "undecided_calls": list(record.undecided),
            "decisions": [
                {
                    "tool_call_id": told.tool_call_id,
                    "decision": told.decision,
                    "by": told.by or None,
                    "note": told.note or None,
                    "decided_at": iso_time(told.decided_at_ms),
                }
                for told in record.decisions
            ],
            "session_id": task.session_id,
            "metadata": task.metadata,
            "degraded": False,
        }

    def _of_task(self, view: JobView) -> dict[str, object]:
        """What the message alone tells."""
        task = _task_of(view)
        status = _status_without_record(view)
        return {
            **self.links(task.job_id, task.generation, status),
            "priority": task.priority,
            "generation": task.generation,
            "attempt": 0,
            "retries": 0,
            "max_retries": task.max_retries,
            "created_at": None,
            "started_at": None,
            "finished_at": None,
            "next_attempt_at": _iso(task.run_at),
            "expires_at": _iso(task.expires_at),
            "worker": None,
            "cancel_requested": False,
            "progress": _progress(task, str(status), 0.0, {}),
            "error": None,
            "output_available": False,
            "undecided_calls": [],
            "decisions": [],
            "session_id": task.session_id,
            "metadata": task.metadata,
            "degraded": view.degraded,
        }


async def whole_job(views: Views, service: JobService, view: JobView) -> Job:
    """A job as it is known at this moment, with the last entries of its log."""
    return views.job(view, await service.recent_events(view.record) if view.record is not None else ())


def json_answer(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A model as an answer whose status is chosen by what happened."""
    return Response(model.model_dump_json(), status, headers, "application/json")


def event_of(event: JobEvent) -> Event:
    """An event as clients see it."""
    return Event(id=event.id, event=event.type.value, data=event.payload())


def result_of(record: JobRecord, results: Mapping[str, ToolResult]) -> JobResult:
    """The results of a job that has ended."""
    return JobResult(
        job_id=record.job_id,
        task_id=f"{record.job_id}:{record.generation}",
        status=record.status,
        error=record.error,
        results=call_results(record.task.tools, results, record.undecided),
    )


def call_results(
    calls: Sequence[ToolCall], results: Mapping[str, ToolResult], undecided: Sequence[str]
) -> list[CallResult]:
    """One entry a call, in the order of the calls, also for those without a result."""
    return [_call_result(call, results.get(call.tool_call_id), call.tool_call_id in undecided) for call in calls]


def _call_result(call: ToolCall, result: ToolResult | None, undecided: bool) -> CallResult:
    if result is None:
        return CallResult(
            tool_call_id=call.tool_call_id,
            tool_name=call.tool_name,
            status="unknown" if undecided else "no_result",
            content=[],
            structured_content=None,
            is_error=False,
            error=None,
            attempt=None,
            duration_ms=None,
        )
    return CallResult(
        tool_call_id=call.tool_call_id,
        tool_name=call.tool_name,
        status=result.status,
        content=list(result.content),
        structured_content=result.structured_content,
        is_error=result.is_error,
        error=result.error,
        attempt=result.attempt,
        duration_ms=result.duration_ms,
    )


def _progress(task: TaskDefinition, stage: str, percent: float, results: Mapping[str, ToolResult]) -> Progress:
    completed = sum(result.status == "completed" for result in results.values())
    return Progress(
        stage=stage,
        percent=percent,
        message=None,
        total_tools=len(task.tools),
        completed_tools=completed,
        failed_tools=len(results) - completed,
        current_tool=None,
    )


def _task_of(view: JobView) -> TaskDefinition:
    assert view.task is not None, "a view without a record has the task from the stream"
    return view.task


def _status_without_record(view: JobView) -> JobStatus:
    # Published a moment ago and not yet recorded, or Redis is down and nothing more is known.
    return "queued_or_running" if view.degraded else Status.QUEUED


def _iso(millis: Millis | None) -> str | None:
    return iso_time(millis) if millis else None
