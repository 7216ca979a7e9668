"""Small makers of tasks, results and endings for tests."""

from __future__ import annotations

from typing import Any, Literal

from toolfleet.services.background_jobs import transitions
from toolfleet.services.background_jobs.ports import Changes
from toolfleet.services.background_jobs.task_models import (
    ErrorInfo,
    EventType,
    NewEvent,
    Status,
    TaskDefinition,
    ToolCall,
    ToolResult,
    new_job_id,
)
from toolfleet.services.background_jobs.transitions import CallStop, Ending, StoppedCall

LEASE_MS = 60_000


def make_task(calls: int = 1, tool: str = "echo", **overrides: Any) -> TaskDefinition:
    """A task of so many calls named ``c1``, ``c2``, …"""
    values: dict[str, Any] = {
        "job_id": new_job_id(),
        "tools": tuple(ToolCall(tool_call_id=f"c{n}", tool_name=tool) for n in range(1, calls + 1)),
        "body_hash": "hash",
    }
    return TaskDefinition(**(values | overrides))


def result(call: str, status: Literal["completed", "failed"] = "completed", text: str = "") -> ToolResult:
    """A result of a call."""
    return ToolResult(
        tool_call_id=call, tool_name="echo", status=status, content=({"type": "text", "text": text},), attempt=1
    )


def told(*calls: str, status: Literal["completed", "failed"] = "completed") -> Changes:
    """Results of calls, with an event each."""
    kind = EventType.TOOL_COMPLETED if status == "completed" else EventType.TOOL_FAILED
    return Changes(
        results=tuple(result(call, status) for call in calls),
        events=tuple(NewEvent(kind, {"tool_call_id": call}) for call in calls),
    )


def ending(status: Status, job_id: str = "", undecided: tuple[str, ...] = ("c1",)) -> Ending:
    """A terminal transition as an attempt makes it."""
    match status:
        case Status.COMPLETED:
            return transitions.completed(1)
        case Status.CANCELLED:
            return transitions.cancelled(transitions.Cancelled(STOPPED))
        case Status.UNKNOWN:
            return transitions.unknown(job_id, undecided)
        case _:
            return transitions.failed(ERROR)


STOPPED = (StoppedCall("c1", "echo", CallStop.STOPPED),)
ERROR = ErrorInfo(code="tool_failed", message="it failed")
