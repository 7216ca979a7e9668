"""The bound of what all results of one attempt may hold together."""

from __future__ import annotations

import dataclasses

from toolfleet.services.background_jobs.call_run import CallOutcome
from toolfleet.services.background_jobs.task_models import ErrorInfo, ToolCall, ToolResult
from toolfleet.services.background_jobs.transitions import CallEnd


class ResultBudget:
    """Takes results while there is room: a job's record and results are read and sent as a whole.

    Args:
        max_bytes: of the results' JSON. One call's alone is bounded where it is run, so a job of one call is not
            measured again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used = 0

    def take(self, call: ToolCall, outcome: CallOutcome) -> CallOutcome:
        """The outcome, or, where its result does not fit any more, a failure in its place."""
        result = outcome.result
        if result is None:
            return outcome
        size = len(result.to_json())
        if self._used + size <= self._max_bytes:
            self._used += size
            return outcome
        error = ErrorInfo(
            code="result_too_large",
            message=f"the result of '{call.tool_name}' has {size} bytes, and with the {self._used} of the job's other "
            f"results that is more than the limit of {self._max_bytes}; raise TOOLFLEET_MAX_JOB_RESULT_BYTES, or split "
            "the job",
            tool_call_id=call.tool_call_id,
        )
        failed = ToolResult(
            tool_call_id=call.tool_call_id,
            tool_name=call.tool_name,
            status="failed",
            error=error.model_copy(update={"tool_call_id": None}),
            attempt=result.attempt,
        )
        return dataclasses.replace(outcome, end=CallEnd.FAILED, result=failed, error=error)
