"""What the API takes and answers about dead letters."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from toolfleet.api.models import Event, IsoTime, JobSummary
from toolfleet.services.background_jobs.job_request import Moment
from toolfleet.services.background_jobs.task_models import ErrorInfo, Tier

MANY_MAX = 500
"""Letters that one request may redrive or discard: it is answered when all of them are done."""
MAX_SEQ = 2**53 - 1
"""Of a place in the stream: beyond it lies what a float of JSON can't tell apart."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class DeadLetterEntry(_Answer):
    """A job, or a message that is no job, that needs a person."""

    id: str = Field(examples=["job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB", "letter_17"])
    """What it is asked for by: the job's id, or ``letter_<seq>`` for a malformed message."""
    seq: int
    """Its place in the dead letter stream."""
    at: IsoTime
    job_id: str | None
    """Of a malformed message: the id that its subject names, or null."""
    attempt: int
    """The one that gave up; 0 for a malformed message."""
    generation: int | None
    """Of the job; null for a malformed message."""
    reason: str
    message: str
    tools: list[str]
    """Names of the tools it was to call; empty for a malformed message."""
    payload_bytes: int
    malformed: bool
    """It is no job: it can be looked at and discarded, and not redriven."""


class DeadLetterList(_Answer):
    """Dead letters from the oldest."""

    dead_letters: list[DeadLetterEntry]
    cursor: int | None = Field(ge=0)
    """Of the next page; null on the last one. With a filter a page may have fewer entries than asked for and go on."""


class RawMessage(_Answer):
    """A message as it stood in the queue."""

    subject: str | None
    """Where it was published; null where that was not noted."""
    encoding: Literal["utf-8", "base64"]
    """How `data` is written: as text where the message is valid UTF-8, else in base64."""
    data: str
    """Its beginning, at most 64 KiB of it."""
    shown_bytes: int
    """Bytes of the message that `data` stands for."""
    bytes: int
    """Of the whole message."""
    sha256: str
    """Of the whole message, hexadecimal."""


class StoredResult(_Answer):
    """What is stored of a call; its content is in the job's result."""

    status: Literal["completed", "failed", "cancelled", "unknown"]
    attempt: int
    duration_ms: int
    is_error: bool
    error: ErrorInfo | None


class LetterCall(_Answer):
    """A call of the job, and its stored result."""

    tool_call_id: str
    tool_name: str
    tool_args: dict[str, JsonValue]
    result: StoredResult | None
    """Null where none is stored: a redrive runs it, as it does those whose result says failed."""


class LetterTask(_Answer):
    """The job as it was asked for."""

    priority: Tier
    max_retries: int
    timeout_seconds: float
    session_id: str | None
    metadata: dict[str, JsonValue]
    calls: list[LetterCall]


class AttemptSummary(_Answer):
    """One run of the job, as the log tells it."""

    attempt: int
    generation: int
    worker: str | None
    started_at: IsoTime
    ended_at: IsoTime | None
    """Null where it ended without a word, or runs."""
    outcome: str
    """A terminal status, `retrying`, `handed_back`, `lease_expired`, …; `no_word` where its worker died or was cut off;
    `running`."""


class LoggedError(_Answer):
    """An error that the log tells."""

    at: IsoTime
    attempt: int
    event: str
    tool_call_id: str | None
    error: dict[str, JsonValue]


class DeadLetterDetail(_Answer):
    """All that is known of a dead letter."""

    id: str
    job_id: str | None
    letters: list[DeadLetterEntry]
    """All of this job, the latest attempt last."""
    task: LetterTask | None
    """Null for a malformed message, and for a task of a newer version of toolfleet."""
    job: JobSummary | None
    """As it stands now; null where its record has expired, and for a malformed message."""
    attempts: list[AttemptSummary]
    """As far as the log reaches back."""
    errors: list[LoggedError]
    """The last ones, the latest at the end."""
    events: list[Event]
    """The log, as far as it is kept; at most its last 1,000 events."""
    raw: RawMessage | None
    """Of what is no job, or can't be read."""


class Redriven(_Answer):
    """The job runs again."""

    id: str
    job_id: str
    task_id: str
    """Of the new generation: ``<job_id>:<generation>``."""
    generation: int
    poll_url: str
    sse_url: str


class Discarded(_Answer):
    """The letters are gone; the job's record, where there is one, is as it was."""

    id: str
    discarded: int
    """Letters removed."""


class LeftAlone(_Answer):
    """One that was not redriven or discarded."""

    id: str
    why: str


class ManyLetters(_Answer):
    """What became of many."""

    matched: int
    ids: list[str]
    """What was meant: with `dry_run` all that would be, else what was done."""
    done: int
    failed: list[LeftAlone]
    dry_run: bool
    cursor: int | None
    """Where to go on: send it as `cursor`. Null where all letters were looked at."""


class Note(BaseModel):
    """Why; it is told in the job's log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    note: str | None = Field(None, min_length=1, max_length=500)


class LetterSelection(Note):
    """Which letters are meant: those that fit everything that is given; without a filter, all."""

    reason: str | None = Field(None, min_length=1, max_length=100, examples=["too_many_starts"])
    tool_name: str | None = Field(None, min_length=1, max_length=256)
    """A tool that the job was to call, as the job named it."""
    older_than: Moment | None = None
    """Written before this time."""
    newer_than: Moment | None = None
    """Written after it."""
    limit: int = Field(ge=1, le=MANY_MAX)
    """Of jobs to redrive, or of letters to discard: always to be given."""
    cursor: int = Field(0, ge=0, le=MAX_SEQ)
    """From the answer before."""
    dry_run: bool = False
    """Only say what would be done."""
