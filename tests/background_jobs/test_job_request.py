"""What a client may ask for (G11), and what it becomes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from toolfleet.services.background_jobs.errors import InvalidTask, TaskTooLarge
from toolfleet.services.background_jobs.job_request import MAX_DEPTH, NewJob, depth_of, make_task
from toolfleet.services.background_jobs.task_models import TaskDefinition, new_job_id

given_names = st.sampled_from([None, None, "call_1", "call_2", "call_3", "call_1_2", "call_2_2", "mine"])


def new_job(**fields: Any) -> NewJob:
    return NewJob.model_validate({"tools": [{"tool_name": "echo"}]} | fields)


def task_of(new: NewJob, **limits: Any) -> TaskDefinition:
    bounds = {"max_calls": 100, "max_bytes": 900 * 1024, "default_retries": 2, "default_timeout_s": 600.0}
    return make_task(new, new_job_id(), tenant="default", **(bounds | limits))


@given(st.lists(given_names, min_size=1, max_size=8))
def test_every_call_gets_a_name_of_its_own(names: list[str | None]) -> None:
    tools = [{"tool_name": "echo", "tool_call_id": name} for name in names]
    wanted = [name for name in names if name is not None]
    if len(wanted) != len(set(wanted)):
        with pytest.raises(ValidationError, match="unique"):
            new_job(tools=tools)
        return
    made = [call.tool_call_id for call in new_job(tools=tools).calls()]
    assert len(set(made)) == len(names)
    assert all(name is None or name == given for name, given in zip(names, made, strict=True))


def test_names_are_numbered_where_none_is_given() -> None:
    new = new_job(tools=[{"tool_name": "a"}, {"tool_name": "b"}])
    assert [call.tool_call_id for call in new.calls()] == ["call_1", "call_2"]


@given(st.integers(1, 2000), st.booleans())
def test_depth_is_counted_without_recursion(depth: int, lists: bool) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value] if lists else {"x": value}
    assert depth_of(value) == depth


@pytest.mark.promise("G11")
@pytest.mark.parametrize("place", ["metadata", "tool_args"])
def test_arguments_nested_too_deeply_are_refused(place: str) -> None:
    def nested(levels: int) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for _ in range(levels - 1):
            value = {"x": value}
        return value

    def job(levels: int) -> NewJob:
        value = nested(levels)
        if place == "metadata":
            return new_job(metadata=value)
        return new_job(tools=[{"tool_name": "echo", "tool_args": value}])

    around = 1 if place == "metadata" else 2
    assert job(MAX_DEPTH - around)
    with pytest.raises(ValidationError, match="nested deeper"):
        job(MAX_DEPTH + 1)


@pytest.mark.promise("G11")
@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [{"tool_name": ""}]},
        {"tools": [{"tool_name": "t", "tool_call_id": "a b"}]},
        {"priority": "urgent"},
        {"max_retries": -1},
        {"timeout_seconds": 0},
        {"timeout_seconds": float("nan")},
        {"delay_seconds": 31 * 86400},
        {"delay_seconds": 1, "run_at": "2030-01-01T00:00:00Z"},
        {"mode": "sync", "delay_seconds": 1},
        {"run_at": "2030-01-02T00:00:00Z", "expires_at": "2030-01-01T00:00:00Z"},
        {"run_at": "2030-01-02T00:00:00"},
        {"surprise": 1},
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        new_job(**fields)


@pytest.mark.promise("G11")
def test_a_job_that_is_too_large_is_refused_with_its_size() -> None:
    new = new_job(metadata={"x": "y" * 2000})
    with pytest.raises(TaskTooLarge) as caught:
        task_of(new, max_bytes=1500)
    assert caught.value.details["size"] > 2000
    assert caught.value.details["limit"] == 1500
    assert len(task_of(new, max_bytes=caught.value.details["size"]).to_json()) == caught.value.details["size"]


@pytest.mark.promise("G11")
def test_more_calls_than_the_limit_are_refused() -> None:
    tools = [{"tool_name": "t"}] * 4
    assert task_of(new_job(tools=tools), max_calls=4)
    with pytest.raises(InvalidTask, match="at most 3 calls"):
        task_of(new_job(tools=tools), max_calls=3)


@pytest.mark.promise("G6")
def test_the_hash_is_of_what_was_asked_for_not_of_how_it_was_written() -> None:
    one = new_job(metadata={"a": 1, "b": [1, 2]}, max_retries=None).body_hash()
    assert one == new_job(metadata={"b": [1, 2], "a": 1}).body_hash()
    assert one != new_job(metadata={"a": 1, "b": [2, 1]}).body_hash()
    assert one != new_job(metadata={"a": 1, "b": [1, 2]}, priority="low").body_hash()


def test_what_is_not_said_comes_from_the_limits() -> None:
    task = task_of(new_job(), default_retries=7, default_timeout_s=1.5)
    assert (task.max_retries, task.timeout_ms) == (7, 1500)
    task = task_of(new_job(max_retries=0, timeout_seconds=0.001))
    assert (task.max_retries, task.timeout_ms) == (0, 1)
