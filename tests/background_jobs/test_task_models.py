"""Tasks as they travel, and ids."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.background_jobs.making import make_task, result
from toolfleet.services.background_jobs.errors import MalformedTask, NewerTask
from toolfleet.services.background_jobs.task_models import (
    EventType,
    JobEvent,
    Status,
    TaskDefinition,
    Tier,
    ToolCall,
    ToolResult,
    aware,
    derived_job_id,
    is_job_id,
    iso_time,
    millis_of,
    new_job_id,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{}\"\\", max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
objects = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), json_values, max_size=3)
names = st.from_regex(r"\A[A-Za-z0-9_.:-]{1,20}\Z")
tasks = st.builds(
    TaskDefinition,
    job_id=st.builds(new_job_id),
    generation=st.integers(1, 10**6),
    tenant=st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    tools=st.lists(
        st.builds(ToolCall, tool_call_id=names, tool_name=st.just("t"), tool_args=objects),
        min_size=1,
        max_size=3,
    ).map(tuple),
    priority=st.sampled_from(Tier),
    max_retries=st.integers(0, 20),
    timeout_ms=st.integers(1, 10**9),
    delay_ms=st.integers(0, 10**9),
    run_at=st.none() | st.integers(0, 10**13),
    expires_at=st.none() | st.integers(0, 10**13),
    session_id=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    metadata=objects,
    body_hash=st.text("0123456789abcdef", max_size=64),
)  # fmt: skip


@given(tasks)
def test_a_task_arrives_as_it_was_sent(task: TaskDefinition) -> None:
    assert TaskDefinition.from_json(task.to_json()) == task
    assert json.loads(task.to_json())["v"] == 1


@given(tasks, st.integers(2, 1000))
def test_a_newer_version_is_told_apart_whatever_else_it_holds(task: TaskDefinition, version: int) -> None:
    body = json.loads(task.to_json()) | {"v": version, "tools": "in another form"}
    with pytest.raises(NewerTask, match=f"version {version}"):
        TaskDefinition.from_json(json.dumps(body))


def test_a_field_added_within_a_version_does_not_matter() -> None:
    task = make_task()
    body = json.loads(task.to_json()) | {"added_later": 1}
    body["tools"][0]["added_later"] = {"x": 1}
    assert TaskDefinition.from_json(json.dumps(body)) == task
    stored = json.loads(result("c1").to_json()) | {"added_later": 1}
    assert ToolResult.model_validate(stored) == result("c1")


@pytest.mark.promise("G11")
@given(
    st.binary(max_size=200) | st.text(max_size=50).map(str.encode) | json_values.map(lambda v: json.dumps(v).encode())
)
def test_anything_else_is_malformed_and_says_so(data: bytes) -> None:
    with pytest.raises((MalformedTask, NewerTask)):
        TaskDefinition.from_json(data)


@pytest.mark.promise("G11")
@pytest.mark.parametrize("opening", [b"[", b'{"v":', b'{"tools":['])
def test_a_message_nested_too_deeply_is_malformed(opening: bytes) -> None:
    with pytest.raises(MalformedTask):
        TaskDefinition.from_json(opening * 100_000)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"job_id": "job_x"}, "job_id"),
        ({"tools": []}, "tools"),
        ({"tools": [{"tool_call_id": "a b", "tool_name": "t"}]}, "tools.0.tool_call_id"),
        ({"max_retries": 21}, "max_retries"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"priority": "urgent"}, "priority"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], where: str) -> None:
    body = json.loads(make_task().to_json()) | change
    with pytest.raises(MalformedTask, match=where):
        TaskDefinition.from_json(json.dumps(body))


@pytest.mark.promise("G6")
@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_a_key_always_gives_the_same_id_and_another_one_to_other_tenants(key: str, one: str, other: str) -> None:
    key, one, other = (text.replace("\0", "").encode(errors="replace").decode() for text in (key, one, other))
    job_id = derived_job_id(one, key)
    assert is_job_id(job_id)
    assert job_id == derived_job_id(one, key)
    assert (job_id == derived_job_id(other, key)) == (one == other)


def test_fresh_ids_are_valid_and_different() -> None:
    ids = {new_job_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_job_id(each) for each in ids)


@pytest.mark.parametrize(
    "text", ["", "job_", "job_8" + "0" * 25, "job_" + "U" * 26, "JOB_" + "0" * 26, "job_" + "0" * 27]
)
def test_what_is_no_id_is_told_from_one(text: str) -> None:
    assert not is_job_id(text)


def test_times_keep_their_milliseconds_and_need_a_zone() -> None:
    assert iso_time(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
    assert millis_of(aware(1_700_000_000_123)) == 1_700_000_000_123
    with pytest.raises(ValueError, match="time zone"):
        millis_of(aware(0).replace(tzinfo=None))


def test_the_terminal_events_are_those_of_the_terminal_statuses() -> None:
    for kind in EventType:
        event = JobEvent(id=1, type=kind, job_id="job_1", generation=1, attempt=0, at=0, data={})
        name = kind.removeprefix("job.")
        assert event.ends_stream == (kind.startswith("job.") and name in {s.value for s in Status if s.terminal})
