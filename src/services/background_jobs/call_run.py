"""One call of an attempt: describe, mark where it must not run twice, run within its time, tell what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from toolfleet.services.background_jobs.errors import (
    LeaseLost,
    ToolConnectionLost,
    ToolFailure,
    ToolTimedOut,
    ToolUnavailable,
    UnknownTool,
)
from toolfleet.services.background_jobs.ports import CallContext, ProgressSink, ToolRunner, ToolSpec
from toolfleet.services.background_jobs.task_models import ErrorInfo, ToolCall, ToolResult
from toolfleet.services.background_jobs.transitions import CallEnd, CallStop

log = structlog.get_logger(__name__)

RUNNER_GRACE_S = 5.0
"""A runner ends a call by itself at its time-out; this much later it is cut off."""


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What came of one call."""

    end: CallEnd
    result: ToolResult | None = None
    """Set where the call is over for good."""
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class CallRules:
    """What one call is run by."""

    timeout_s: float
    may_retry: bool
    """Whether the job has a retry left."""


async def run_call(
    runner: ToolRunner,
    call: ToolCall,
    *,
    job_id: str,
    attempt: int,
    rules: CallRules,
    on_progress: ProgressSink,
    begin: Callable[[ToolCall, ToolSpec], Awaitable[None]],
    before_send: Callable[[], None],
    on_stop: Callable[[CallStop], None],
    withdraw: Callable[[ToolCall], Awaitable[None]],
) -> CallOutcome:
    """Run one call.

    Args:
        begin: told before the call is sent; for a call that must not run twice it writes the start and raises
            `LeaseLost` where the attempt no longer holds the job.
        before_send: told by the runner right before the call may reach the tool; raises `LeaseLost` likewise.
        on_stop: told by the runner, where the attempt was stopped, how far that got.
        withdraw: takes such a start back, for a call that was surely not sent.

    Raises:
        LeaseLost: from `begin` or `before_send`.
        asyncio.CancelledError: the attempt was stopped; the runner has told the tool's server.
    """
    try:
        spec = await runner.describe(call.tool_name)
    except UnknownTool as error:
        return _failed(call, attempt, ErrorInfo(code="unknown_tool", message=str(error)))
    except ToolUnavailable as error:
        return _judge(call, attempt, error, repeatable=True, rules=rules)
    await begin(call, spec)
    context = CallContext(
        job_id, attempt, f"{job_id}:{call.tool_call_id}", rules.timeout_s, on_progress, before_send, on_stop
    )
    try:
        async with asyncio.timeout(rules.timeout_s + RUNNER_GRACE_S):
            result = await runner.run(spec, call, context)
    except ToolFailure as error:
        if not error.sent and not spec.repeatable:
            await withdraw(call)
        return _judge(call, attempt, error, repeatable=spec.repeatable, rules=rules)
    except TimeoutError:
        late = ToolTimedOut(f"{call.tool_name} did not end within {rules.timeout_s:g} s, nor when it was stopped")
        return _judge(call, attempt, late, repeatable=spec.repeatable, rules=rules)
    except LeaseLost:
        raise
    except Exception as error:
        # A runner's own fault must end as a failed call, not as a worker that loses the job; the log has the trace.
        log.exception("call.runner_failed", job_id=job_id, tool_call_id=call.tool_call_id)
        fault = ToolConnectionLost(f"running {call.tool_name} failed in the worker: {type(error).__name__}: {error}")
        return _judge(call, attempt, fault, repeatable=spec.repeatable, rules=rules)
    end = CallEnd.COMPLETED if result.status == "completed" else CallEnd.FAILED
    return CallOutcome(end, result, result.error)


def _judge(call: ToolCall, attempt: int, failure: ToolFailure, *, repeatable: bool, rules: CallRules) -> CallOutcome:
    """What follows from a failure: sent and answered decide whether the outcome is known, the policy the rest."""
    error = ErrorInfo(code=failure.code, message=str(failure), tool_call_id=call.tool_call_id)
    if not repeatable and failure.sent and not failure.answered:
        return CallOutcome(CallEnd.UNKNOWN, None, error)
    may_repeat = failure.repeat and (repeatable or not failure.sent)
    if may_repeat and rules.may_retry:
        return CallOutcome(CallEnd.RETRY, None, error)
    return _failed(call, attempt, error)


def _failed(call: ToolCall, attempt: int, error: ErrorInfo) -> CallOutcome:
    result = ToolResult(
        tool_call_id=call.tool_call_id,
        tool_name=call.tool_name,
        status="failed",
        error=error.model_copy(update={"tool_call_id": None}),
        attempt=attempt,
    )
    return CallOutcome(CallEnd.FAILED, result, error)
