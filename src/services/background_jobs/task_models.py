"""The words of toolfleet as frozen models: calls, tasks, records, events and results.

Times are integers, milliseconds since the epoch in UTC by the clock of the Redis server, where they are stored and
compared; `iso_time` and `aware` turn them into what a person or an API reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError
from ulid import ULID

from toolfleet.services.background_jobs.errors import MalformedTask, NewerTask

TASK_VERSION: Final = 1
"""Of the task's JSON. A worker hands a higher one back for a newer worker."""

DEFAULT_TENANT: Final = "default"

Millis = int
"""Milliseconds since the epoch, UTC."""

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_JOB_ID = re.compile(r"job_[0-7][0-9A-HJKMNP-TV-Z]{25}")
JobId = Annotated[str, Field(pattern=r"^job_[0-7][0-9A-HJKMNP-TV-Z]{25}$", examples=["job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB"])]


class Status(StrEnum):
    """Where a job stands. The last four are terminal: within a generation they never change."""

    QUEUED = "queued"
    """Waiting for a worker, or for its next attempt (`next_attempt_at`)."""
    RUNNING = "running"
    """An attempt holds it."""
    COMPLETED = "completed"
    """Every call has a result."""
    FAILED = "failed"
    """A call failed for good, or the job ran out of time or of starts."""
    CANCELLED = "cancelled"
    """Stopped because somebody asked for it."""
    UNKNOWN = "unknown"
    """A call that must not run twice was started and its outcome is not known; a person decides."""

    @property
    def terminal(self) -> bool:
        """Whether the generation has ended."""
        return self not in (Status.QUEUED, Status.RUNNING)


class Tier(StrEnum):
    """Priority: each tier is a subject and a consumer of its own."""

    HIGH = "high"
    """A person is waiting."""
    NORMAL = "normal"
    """The default."""
    LOW = "low"
    """Bulk work that may wait for the night."""


class EventType(StrEnum):
    """What a job's log tells."""

    JOB_QUEUED = "job.queued"
    """Accepted, reopened or handed back."""
    JOB_STARTED = "job.started"
    """An attempt claimed the job."""
    TOOL_STARTED = "tool.started"
    """A call is being sent to its tool."""
    TOOL_PROGRESS = "tool.progress"
    """The tool's own progress notification, coalesced."""
    TOOL_COMPLETED = "tool.completed"
    """A call's result is stored."""
    TOOL_FAILED = "tool.failed"
    """A call failed; `will_retry` says whether another attempt follows."""
    JOB_RETRYING = "job.retrying"
    """The attempt ended; the next one is due at `next_attempt_at`."""
    JOB_CANCELLING = "job.cancelling"
    """A cancel got as far as `reached`."""
    JOB_COMPLETED = "job.completed"
    """Terminal: completed."""
    JOB_FAILED = "job.failed"
    """Terminal: failed."""
    JOB_CANCELLED = "job.cancelled"
    """Terminal: cancelled."""
    JOB_UNKNOWN = "job.unknown"
    """Terminal: unknown."""


TERMINAL_EVENTS: Final = frozenset(
    {EventType.JOB_COMPLETED, EventType.JOB_FAILED, EventType.JOB_CANCELLED, EventType.JOB_UNKNOWN}
)


class _Frozen(BaseModel):
    # Unknown fields are ignored: what a newer worker of the same version adds must not make stored data unreadable.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ToolCall(_Frozen):
    """One call of one tool."""

    tool_call_id: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")
    """Unique in its job."""
    tool_name: str = Field(min_length=1, max_length=256)
    """``tool``, or ``server/tool`` where two servers have a tool of one name."""
    tool_args: dict[str, JsonValue] = Field(default_factory=dict)


class TaskDefinition(_Frozen):
    """The message by which a job travels: all that a worker needs to know without any other source."""

    v: Literal[1] = TASK_VERSION
    job_id: JobId
    generation: int = Field(1, ge=1)
    tenant: str = DEFAULT_TENANT
    tools: tuple[ToolCall, ...] = Field(min_length=1, max_length=1000)
    priority: Tier = Tier.NORMAL
    max_retries: int = Field(2, ge=0, le=20)
    timeout_ms: int = Field(600_000, ge=1)
    """Running time of the job over all attempts, waiting not counted."""
    delay_ms: int = Field(0, ge=0)
    """From the time of submission to the first attempt."""
    run_at: Millis | None = None
    """Not before this time."""
    expires_at: Millis | None = None
    """Ends a job that was never started."""
    session_id: str | None = Field(None, max_length=256)
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    body_hash: str = ""
    """SHA-256 of the request's canonical JSON: the same Idempotency-Key with another hash is a conflict (G6)."""

    @property
    def task_id(self) -> str:
        """The id of the message: ``<job_id>:<generation>``, also its Nats-Msg-Id."""
        return f"{self.job_id}:{self.generation}"

    def to_json(self) -> bytes:
        """The task as it travels."""
        return self.model_dump_json(exclude_defaults=True).encode().replace(b"{", b'{"v":1,', 1)

    @classmethod
    def from_json(cls, data: bytes | str) -> TaskDefinition:
        """Read a task as it travelled.

        Raises:
            NewerTask: its version is not known here.
            MalformedTask: it is no task; the message says at which field.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            if _version_of(data) > TASK_VERSION:
                raise NewerTask(
                    f"the task has version {_version_of(data)}, this program knows {TASK_VERSION}"
                ) from None
            where = ".".join(str(part) for part in first["loc"]) or "the message"
            raise MalformedTask(f"not a task: {where}: {first['msg']}") from None


def _version_of(data: bytes | str) -> int:
    try:
        version = json.loads(data).get("v", 0)
    except (ValueError, AttributeError, RecursionError):
        return 0
    return version if isinstance(version, int) else 0


MAX_ERROR: Final = 2000
"""Characters of an error message that are kept: some of its words are a tool's own."""


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR - 1]}…"


class ErrorInfo(_Frozen):
    """Why a call or a job failed."""

    code: str
    """One word for programs: `timeout`, `tool_error`, `too_many_starts`, …"""
    message: Annotated[str, AfterValidator(_shortened)]
    """One sentence for people: what happened, to which part, what to do; of a longer text the beginning."""
    tool_call_id: str | None = None


class ToolResult(_Frozen):
    """What one call gave: its content as the tool sent it, or why there is none."""

    tool_call_id: str
    tool_name: str
    status: Literal["completed", "failed", "cancelled", "unknown"]
    content: tuple[dict[str, JsonValue], ...] = ()
    """MCP content blocks, untouched: text, image, audio, resource, resource_link."""
    structured_content: JsonValue = None
    is_error: bool = False
    """The tool's own word that it failed (MCP `isError`)."""
    error: ErrorInfo | None = None
    attempt: int = 0
    duration_ms: int = 0

    def to_json(self) -> str:
        """Compact JSON, defaults left out."""
        return self.model_dump_json(exclude_defaults=True)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be appended; the store adds its id, its time and the attempt."""

    type: EventType
    data: Mapping[str, Any] = field(default_factory=dict)
    """JSON."""


class JobEvent(_Frozen):
    """One entry of a job's log."""

    id: int
    """Its place in the log, from 1; also the SSE id."""
    type: EventType
    job_id: str
    generation: int
    attempt: int
    """The fence of the attempt it belongs to; 0 before the first."""
    at: Millis
    data: dict[str, JsonValue]

    @property
    def ends_stream(self) -> bool:
        """Whether this is the terminal event of its generation."""
        return self.type in TERMINAL_EVENTS

    def payload(self) -> dict[str, JsonValue]:
        """As clients see it: the common fields and the event's own data."""
        return {"job_id": self.job_id, "attempt": self.attempt, "at": iso_time(self.at), **self.data}


class Gap(_Frozen):
    """Events that a reader asked for and that were trimmed from the capped log, or that Redis has lost."""

    after: int
    """The last id the reader had."""
    resumes_at: int
    """The first id that is still there."""


class CallDecision(_Frozen):
    """A person's word on a call whose outcome was not known."""

    tool_call_id: str
    decision: Literal["rerun", "completed", "failed"]
    by: str = ""
    """Who, as the client said; empty where it did not."""
    note: str = ""
    decided_at_ms: Millis = 0


class JobRecord(_Frozen):
    """A job as the store keeps it."""

    job_id: str
    task: TaskDefinition
    status: Status
    generation: int
    fence: int = 0
    starts: int = 0
    retries: int = 0
    created_at: Millis
    started_at: Millis | None = None
    finished_at: Millis | None = None
    next_attempt_at: Millis | None = None
    lease_until: Millis | None = None
    worker: str | None = None
    cancel_requested: bool = False
    error: ErrorInfo | None = None
    completed_calls: int = 0
    failed_calls: int = 0
    current_tool: str | None = None
    stage: str | None = None
    percent: float = 0.0
    message: str | None = None
    undecided: tuple[str, ...] = ()
    """Calls whose outcome is not known and that nobody has decided yet."""
    decisions: tuple[CallDecision, ...] = ()
    """What was decided since the job became unknown; with the last decision they move into the log."""
    last_event: int = 0


def new_job_id() -> str:
    """A fresh id, ordered by time."""
    return f"job_{ULID()}"


def derived_job_id(tenant: str, idempotency_key: str) -> str:
    """The id that a tenant's Idempotency-Key always gives: 128 bits of SHA-256 in ULID's alphabet."""
    number = int.from_bytes(hashlib.sha256(f"{tenant}\0{idempotency_key}".encode()).digest()[:16])
    digits = [_CROCKFORD[(number >> shift) & 31] for shift in range(125, -1, -5)]
    return "job_" + "".join(digits)


def is_job_id(text: str) -> bool:
    """Whether the text has the form of a job id."""
    return _JOB_ID.fullmatch(text) is not None


def iso_time(millis: Millis) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return aware(millis).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def aware(millis: Millis) -> datetime:
    """An aware datetime in UTC."""
    return datetime.fromtimestamp(millis / 1000, UTC)


def millis_of(moment: datetime) -> Millis:
    """Milliseconds of an aware datetime.

    Raises:
        ValueError: the datetime is naive.
    """
    if moment.tzinfo is None:
        raise ValueError("the time has no time zone; write it with an offset, such as 2030-01-01T00:00:00Z")
    return int(moment.timestamp() * 1000)
