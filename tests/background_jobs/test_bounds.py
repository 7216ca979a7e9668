"""What a tool gives is bounded on its way into the record and the log."""

from __future__ import annotations

import math
from typing import Any

from tests.background_jobs.harness import Bench, open_fleet, running_worker
from toolfleet.services.background_jobs.attempt_log import MAX_MESSAGE
from toolfleet.services.background_jobs.call_run import CallOutcome
from toolfleet.services.background_jobs.ports import CallContext
from toolfleet.services.background_jobs.result_budget import ResultBudget
from toolfleet.services.background_jobs.task_models import MAX_ERROR, ErrorInfo, Status, ToolCall, ToolResult
from toolfleet.services.background_jobs.transitions import CallEnd
from toolfleet.settings import Settings


async def test_absurd_progress_is_told_as_far_as_json_and_sense_go(settings: Settings) -> None:
    states: list[tuple[float, float | None, str | None]] = [
        (math.nan, math.inf, "a"),
        (-3, 10, "b"),
        (50, 10, "c"),
        (5, 0, "d"),
        (5, -1, "e"),
        (1e300, 1e308, "f" * 10_000),
    ]

    class Absurd(Bench):
        async def echo(self, args: dict[str, Any], context: CallContext) -> dict[str, Any]:
            context.on_progress(*states[args["n"]])
            return args

    async with open_fleet(settings, workers=0) as fleet, running_worker(settings, Absurd()):
        told = []
        for number in range(len(states)):
            job_id = await fleet.submit(("echo", {"n": number}))
            record = await fleet.over(job_id)
            assert record.status is Status.COMPLETED
            progress = [event.data for event in await fleet.log(job_id) if event.type == "tool.progress"]
            assert len(progress) == 1
            told.append((progress[0]["progress"], progress[0].get("total"), progress[0]["message"]))
    assert told == [
        (None, None, "a"),
        (-3, 10, "b"),
        (50, 10, "c"),
        (5, 0, "d"),
        (5, -1, "e"),
        (None, None, "f" * MAX_MESSAGE),
    ]


def test_an_error_keeps_its_beginning() -> None:
    error = ErrorInfo(code="x", message="y" * 1_000_000)
    assert len(error.message) == MAX_ERROR
    assert ErrorInfo.model_validate_json(error.model_dump_json()) == error


def test_results_that_do_not_fit_together_fail_one_by_one() -> None:
    def outcome(name: str, size: int) -> CallOutcome:
        result = ToolResult(tool_call_id=name, tool_name="t", status="completed", structured_content="x" * size)
        return CallOutcome(CallEnd.COMPLETED, result)

    budget = ResultBudget(2000)
    calls = [ToolCall(tool_call_id=f"c{n}", tool_name="t") for n in range(3)]
    first, second, third = (
        budget.take(call, outcome(call.tool_call_id, size)) for call, size in zip(calls, (1000, 1000, 500), strict=True)
    )
    assert first.end is third.end is CallEnd.COMPLETED
    assert second.end is CallEnd.FAILED
    assert second.error is not None
    assert second.result is not None
    assert second.result.error is not None
    assert second.error.code == second.result.error.code == "result_too_large"
    assert second.error.tool_call_id == "c1"
