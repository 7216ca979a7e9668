"""What the API answers, as models. Times are RFC 3339 in UTC; what is not known is null."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from toolfleet.services.background_jobs.job_request import check_free_form
from toolfleet.services.background_jobs.task_models import ErrorInfo, Status, Tier
from toolfleet.services.background_jobs.transitions import CallStop

IsoTime = Annotated[str, Field(json_schema_extra={"format": "date-time"}, examples=["2030-01-01T12:00:00.000Z"])]
JobStatus = Status | Literal["queued_or_running"]
"""The last one only while Redis is down (`degraded`): the stream still holds the job, and no more can be told."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class JobLinks(_Answer):
    """A job and where to go on; paths, or URLs where `TOOLFLEET_PUBLIC_URL` is set."""

    job_id: str = Field(examples=["job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB"])
    task_id: str
    """Of the message by which this generation of the job travels: ``<job_id>:<generation>``."""
    status: JobStatus
    poll_url: str
    result_url: str
    sse_url: str
    cancel_url: str


class JobAccepted(JobLinks):
    """The job is in the queue and will reach a terminal status."""

    degraded: bool
    """Redis is down: whether there was a job under the same Idempotency-Key could not be looked up. Such a job is not
    run again, its own status is told when Redis is back, and another body under its key becomes a dead letter."""


class Progress(_Answer):
    """How far a job is."""

    stage: str
    percent: float = Field(ge=0, le=100)
    message: str | None
    total_tools: int
    completed_tools: int
    failed_tools: int
    current_tool: str | None


class Event(_Answer):
    """One entry of a job's log, as the stream tells it."""

    id: int
    event: str = Field(examples=["tool.completed"])
    data: dict[str, JsonValue]


class DecisionTold(_Answer):
    """A person's word on a call whose outcome was not known."""

    tool_call_id: str
    decision: Literal["rerun", "completed", "failed"]
    by: str | None
    """Who said so, as the client told it."""
    note: str | None
    decided_at: IsoTime


class JobSummary(JobLinks):
    """A job as it stands."""

    priority: Tier
    generation: int
    """One life of the job; resolve, retry and redrive open a new one."""
    attempt: int
    """Runs so far, over all generations."""
    retries: int
    """In this generation."""
    max_retries: int
    created_at: IsoTime | None
    started_at: IsoTime | None
    finished_at: IsoTime | None
    next_attempt_at: IsoTime | None
    expires_at: IsoTime | None
    worker: str | None
    cancel_requested: bool
    progress: Progress
    error: ErrorInfo | None
    output_available: bool
    """Whether `result_url` answers with results."""
    undecided_calls: list[str]
    """Calls that must not run twice, were started, and whose outcome a person has to decide (`resolve`)."""
    decisions: list[DecisionTold]
    """What was decided while others are not; with the last decision a new generation tells them in its `job.queued`."""
    session_id: str | None
    metadata: dict[str, JsonValue]
    degraded: bool
    """Redis is down: this is what the queue alone knows."""


class Job(JobSummary):
    """A job as it stands, with the last entries of its log."""

    recent_events: list[Event]


class CallResult(_Answer):
    """What one call gave."""

    tool_call_id: str
    tool_name: str
    status: Literal["completed", "failed", "cancelled", "unknown", "no_result"]
    """`unknown`: it was started, must not run twice, and nobody has decided yet. `no_result`: the job ended first."""
    content: list[dict[str, JsonValue]]
    """MCP content blocks as the tool sent them."""
    structured_content: JsonValue
    is_error: bool
    """The tool's own word that it failed."""
    error: ErrorInfo | None
    attempt: int | None
    duration_ms: int | None


class JobResult(_Answer):
    """The results of a job that has ended, in the order of its calls; those of a failed or cancelled one as well."""

    job_id: str
    task_id: str
    status: Status
    error: ErrorInfo | None
    results: list[CallResult]


class NotReady(JobLinks):
    """The job has not ended; ask again after the seconds in `Retry-After`."""

    degraded: bool


class JobOutcome(Job):
    """A job that ran while the caller waited, or that was there already, with its results if it has ended."""

    fallback_reason: str | None
    """Why it ran synchronously although the queue was asked for."""
    results: list[CallResult] | None


class StoppedCallState(_Answer):
    """How far a cancel got with one call."""

    tool_call_id: str
    tool_name: str
    state: CallStop
    """`ended`: it had come to an end before. `not_sent`: it never reached its tool. `stopped`: its server has shown
    that it runs no more. `told`: its server was told, and has not shown that it stopped. `not_told`: it was or may have
    been sent, and its server has not been told. With the last two the tool may still be running."""


class CancelOutcome(_Answer):
    """How far a cancel got."""

    job_id: str
    outcome: Literal["cancelled", "cancelling", "already_cancelled"]
    reached: Literal["queued", "requested", "worker", "tool"]
    """`queued`: it was not running. `requested`: its worker has not answered yet. `worker`: that has stopped it, with
    no tool to tell or none that could be told. `tool`: a tool's server was told."""
    calls: list[StoppedCallState]
    """Every call of the job; empty where a cancel of an earlier version is told again."""
    still_running: list[str]
    """Calls that are not known to have stopped: their tools may still be running."""
    status: Status
    worker: str | None


class JobList(_Answer):
    """Jobs from the newest to the oldest."""

    jobs: list[JobSummary]
    cursor: str | None
    """Of the next page; null on the last one."""


class Reason(BaseModel):
    """Why; it is told in the job's log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str | None = Field(None, min_length=1, max_length=500)


class Decision(BaseModel):
    """A person's word on one call of an unknown job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool_call_id: str = Field(min_length=1, max_length=128, examples=["call_1"])
    decision: Literal["rerun", "completed", "failed"]
    """`rerun`: it did not happen, run it again. `completed`, `failed`: it happened, and this is how it went."""
    result: JsonValue = None
    """With `completed`, and only there: what the call gave."""
    note: str = Field("", max_length=500)
    """Why; with `failed` it becomes the error of the call."""

    @field_validator("result")
    @classmethod
    def _can_be_carried(cls, value: JsonValue) -> JsonValue:
        check_free_form(value)
        return value

    @model_validator(mode="after")
    def _only_a_completed_call_gave_something(self) -> Self:
        if self.result is not None and self.decision != "completed":
            raise ValueError(f"a result goes with the decision 'completed', not with '{self.decision}'")
        return self
