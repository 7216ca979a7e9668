"""From dead letters to answers."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Mapping, Sequence
from typing import Final

from toolfleet.api.letter_models import (
    AttemptSummary,
    DeadLetterDetail,
    DeadLetterEntry,
    LetterCall,
    LetterTask,
    LoggedError,
    RawMessage,
    StoredResult,
)
from toolfleet.api.views import Views, event_of
from toolfleet.services.background_jobs.dead_letter_values import Letter, LetterHistory
from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.task_models import (
    EventType,
    JobEvent,
    Status,
    TaskDefinition,
    ToolResult,
    iso_time,
)

RAW_SHOWN: Final = 64 * 1024
"""Bytes of a raw message in an answer: enough to see what it is."""
ERRORS_SHOWN: Final = 20
_ENDS: Final = frozenset({EventType.JOB_RETRYING, EventType.JOB_QUEUED})
"""Events that end an attempt and not the generation."""


def entry_of(found: Letter) -> DeadLetterEntry:
    """A letter in a list."""
    letter, task = found.letter, found.task
    return DeadLetterEntry(
        id=letter.letter_id,
        seq=letter.seq,
        at=iso_time(letter.at),
        job_id=letter.job_id,
        attempt=letter.fence,
        generation=task.generation if task else None,
        reason=letter.reason,
        message=letter.message,
        tools=[call.tool_name for call in task.tools] if task else [],
        payload_bytes=letter.size or len(letter.payload),
        malformed=letter.malformed,
    )


def detail_of(letter_id: str, history: LetterHistory, views: Views) -> DeadLetterDetail:
    """A letter with all that is known of it."""
    newest, record = history.letters[-1], history.record
    task = record.task if record is not None else newest.task
    running = record is not None and record.status is Status.RUNNING
    return DeadLetterDetail(
        id=letter_id,
        job_id=newest.letter.job_id,
        letters=[entry_of(letter) for letter in history.letters],
        task=_task(task, history.results) if task is not None else None,
        job=views.summary(record) if record is not None else None,
        attempts=attempts_of(history.events, running=running),
        errors=_errors(history.events),
        events=[event_of(event) for event in history.events],
        raw=raw_of(newest.letter) if newest.task is None else None,
    )


def _task(task: TaskDefinition, results: Mapping[str, ToolResult]) -> LetterTask:
    return LetterTask(
        priority=task.priority,
        max_retries=task.max_retries,
        timeout_seconds=task.timeout_ms / 1000,
        session_id=task.session_id,
        metadata=task.metadata,
        calls=[
            LetterCall(
                tool_call_id=call.tool_call_id,
                tool_name=call.tool_name,
                tool_args=call.tool_args,
                result=_stored(results.get(call.tool_call_id)),
            )
            for call in task.tools
        ],
    )


def _stored(result: ToolResult | None) -> StoredResult | None:
    if result is None:
        return None
    return StoredResult(
        status=result.status,
        attempt=result.attempt,
        duration_ms=result.duration_ms,
        is_error=result.is_error,
        error=result.error,
    )


def attempts_of(events: Sequence[JobEvent], *, running: bool) -> list[AttemptSummary]:
    """The runs that a log tells of, oldest first; `running` is whether the last one goes on."""
    found: list[AttemptSummary] = []
    for event in events:
        if event.type is EventType.JOB_STARTED:
            worker = event.data.get("worker")
            found.append(
                AttemptSummary(
                    attempt=event.attempt,
                    generation=event.generation,
                    worker=str(worker) if worker else None,
                    started_at=iso_time(event.at),
                    ended_at=None,
                    outcome="no_word",
                )
            )
        elif found and (event.ends_stream or event.type in _ENDS):
            last = found[-1]
            if last.ended_at is None and (last.attempt, last.generation) == (event.attempt, event.generation):
                found[-1] = last.model_copy(update={"ended_at": iso_time(event.at), "outcome": _outcome(event)})
    if running and found and found[-1].ended_at is None:
        found[-1] = found[-1].model_copy(update={"outcome": "running"})
    return found


def _outcome(event: JobEvent) -> str:
    if event.type is EventType.JOB_RETRYING:
        return "retrying"
    return str(event.data.get("status") or event.data.get("reason") or event.type.value)


def _errors(events: Sequence[JobEvent]) -> list[LoggedError]:
    found = []
    for event in events:
        error, call = event.data.get("error"), event.data.get("tool_call_id")
        if isinstance(error, dict):
            found.append(
                LoggedError(
                    at=iso_time(event.at),
                    attempt=event.attempt,
                    event=event.type.value,
                    tool_call_id=str(call) if call else None,
                    error=error,
                )
            )
    return found[-ERRORS_SHOWN:]


def raw_of(letter: DeadLetter) -> RawMessage:
    """The message itself, its beginning at least."""
    shown = letter.payload[:RAW_SHOWN]
    try:
        # Cut in the middle of a character it is text all the same.
        decoder = codecs.getincrementaldecoder("utf-8")()
        text, encoding = decoder.decode(shown, final=len(shown) == (letter.size or len(letter.payload))), "utf-8"
        shown_bytes = len(text.encode())
    except UnicodeDecodeError:
        text, encoding, shown_bytes = base64.b64encode(shown).decode(), "base64", len(shown)
    return RawMessage(
        subject=letter.subject,
        encoding="utf-8" if encoding == "utf-8" else "base64",
        data=text,
        shown_bytes=shown_bytes,
        bytes=letter.size or len(letter.payload),
        sha256=letter.message_key,
    )
