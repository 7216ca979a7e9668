"""What a client asks for, checked before anything is queued."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from toolfleet.services.background_jobs.errors import InvalidTask, TaskTooLarge
from toolfleet.services.background_jobs.task_models import (
    JobId,
    TaskDefinition,
    Tier,
    ToolCall,
    millis_of,
)

MAX_DELAY_S: Final = 30 * 86400
MAX_TIMEOUT_S: Final = 24 * 3600
MAX_DEPTH: Final = 64
"""Of nested JSON in arguments and metadata: deeper than any schema in use, far below what breaks a parser."""


def _within_calendar(moment: AwareDatetime) -> AwareDatetime:
    # Milliseconds of later ones can't be turned back into a date, and earlier ones are below zero.
    if not 1971 <= moment.year <= 9998:
        raise ValueError("must lie in a year from 1971 to 9998")
    return moment


Moment = Annotated[AwareDatetime, AfterValidator(_within_calendar)]
"""With an offset, such as 2030-01-01T00:00:00Z."""


class NewCall(BaseModel):
    """One tool call of a new job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool_name: str = Field(min_length=1, max_length=256, examples=["web_crawl"])
    tool_args: dict[str, JsonValue] = Field(default_factory=dict, examples=[{"url": "https://example.org"}])
    tool_call_id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")] | None = None
    """Unique in the job; `call_1`, `call_2`, … where missing."""


class NewJob(BaseModel):
    """A job as a client asks for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tools: list[NewCall] = Field(min_length=1)
    priority: Tier = Tier.NORMAL
    max_retries: int | None = Field(None, ge=0, le=20)
    timeout_seconds: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S)
    """Running time of the job over all attempts, waiting not counted."""
    mode: Literal["background", "sync"] = "background"
    fallback: Literal["sync", "fail"] = "fail"
    """What to do where the queue is down: run at once and wait, or refuse."""
    delay_seconds: float | None = Field(None, ge=0, le=MAX_DELAY_S)
    run_at: Moment | None = None
    expires_at: Moment | None = None
    session_id: str | None = Field(None, max_length=256)
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> NewJob:
        if self.delay_seconds is not None and self.run_at is not None:
            raise ValueError("give delay_seconds or run_at, not both")
        if self.mode == "sync" and (self.delay_seconds or self.run_at):
            raise ValueError("a synchronous job can't be delayed; use mode background")
        if self.run_at and self.expires_at and self.expires_at <= self.run_at:
            raise ValueError("expires_at is before run_at, so the job could never start")
        ids = [call.tool_call_id for call in self.tools if call.tool_call_id is not None]
        if len(ids) != len(set(ids)):
            raise ValueError("each tool_call_id must be unique in its job")
        check_free_form([[call.tool_args for call in self.tools], self.metadata])
        return self

    def body_hash(self) -> str:
        """SHA-256 of the canonical JSON of what was asked for (G6)."""
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def calls(self) -> tuple[ToolCall, ...]:
        """The calls, each with an id."""
        taken = {call.tool_call_id for call in self.tools}
        calls = []
        for number, call in enumerate(self.tools, 1):
            name = call.tool_call_id
            if name is None:
                name = _free_name(number, taken)
                taken.add(name)
            calls.append(ToolCall(tool_call_id=name, tool_name=call.tool_name, tool_args=call.tool_args))
        return tuple(calls)


def _free_name(number: int, taken: set[str | None]) -> str:
    name, suffix = f"call_{number}", 1
    while name in taken:
        suffix += 1
        name = f"call_{number}_{suffix}"
    return name


def check_free_form(value: Any) -> None:
    """Raises `ValueError` where free-form JSON can't be carried: too deep, or a number that is none in JSON."""
    if depth_of(value) > MAX_DEPTH:
        raise ValueError(f"arguments, metadata or result are nested deeper than {MAX_DEPTH} levels")
    if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value)):
        raise ValueError("arguments, metadata or result hold a number that JSON can't carry: NaN, or beyond 1.8e308")


def depth_of(value: Any) -> int:
    """Levels of nesting, without recursion: the input is a stranger's."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [child for item in level for child in _children(item) if isinstance(child, (dict, list))]
    return deepest


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _leaves(value: Any) -> Iterator[Any]:
    level: list[Any] = [[value]]
    while level:
        children = [child for item in level for child in _children(item)]
        yield from (child for child in children if not isinstance(child, (dict, list)))
        level = [child for child in children if isinstance(child, (dict, list))]


def make_task(
    new: NewJob,
    job_id: JobId,
    *,
    tenant: str,
    max_calls: int,
    max_bytes: int,
    default_retries: int,
    default_timeout_s: float,
) -> TaskDefinition:
    """The task of a new job.

    Raises:
        InvalidTask: too many calls.
        TaskTooLarge: its JSON is above `max_bytes`.
    """
    if len(new.tools) > max_calls:
        raise InvalidTask(f"a job has at most {max_calls} calls, this one has {len(new.tools)}; split it")
    try:
        task = TaskDefinition(
            job_id=job_id,
            tenant=tenant,
            tools=new.calls(),
            priority=new.priority,
            max_retries=default_retries if new.max_retries is None else new.max_retries,
            timeout_ms=max(1, int(1000 * (new.timeout_seconds or default_timeout_s))),
            delay_ms=int(1000 * (new.delay_seconds or 0)),
            run_at=millis_of(new.run_at) if new.run_at else None,
            expires_at=millis_of(new.expires_at) if new.expires_at else None,
            session_id=new.session_id,
            metadata=new.metadata,
            body_hash=new.body_hash(),
        )
    except ValidationError as error:
        raise InvalidTask(f"the job is not valid: {error.errors(include_input=False)[0]['msg']}") from None
    size = len(task.to_json())
    if size > max_bytes:
        raise TaskTooLarge(
            f"the job is {size} bytes as a task, the limit is {max_bytes}; pass large inputs by reference, "
            "for instance as a URL",
            size=size,
            limit=max_bytes,
        )
    return task
