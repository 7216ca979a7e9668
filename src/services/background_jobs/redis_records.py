"""Between Redis' strings and our models: keys, arguments of functions, records, events."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic_core import to_json

from toolfleet.services.background_jobs.errors import StoreError
from toolfleet.services.background_jobs.ports import Changes, Granted
from toolfleet.services.background_jobs.task_models import (
    CallDecision,
    ErrorInfo,
    EventType,
    JobEvent,
    JobRecord,
    NewEvent,
    Status,
    TaskDefinition,
    ToolResult,
    iso_time,
)

PARTITIONS: Final = 16
RECORD_VERSION: Final = 1


def partition_of(job_id: str) -> int:
    """The partition of a job: CRC-32 of its id, modulo 16. Stable for ever, since it is where the data lies."""
    return zlib.crc32(job_id.encode()) % PARTITIONS


ROOTS: Final = tuple(f"tf:{{{partition:02d}}}" for partition in range(PARTITIONS))


def root_of(job_id: str) -> str:
    """The root key of a job's partition, ``tf:{<pp>}``."""
    return ROOTS[partition_of(job_id)]


def birth_args(task: TaskDefinition, data: str, log_max: int, ttl_ms: int) -> tuple[Any, ...]:
    """What a record is made of, in the order of `birth_of` in lua/10_common.lua."""
    return (
        task.generation, task.priority.value, task.tenant, task.body_hash, len(task.tools), task.timeout_ms,
        task.expires_at or 0, task.delay_ms, task.run_at or 0, log_max, ttl_ms, data,
    )  # fmt: skip


def payload_of(result: ToolResult) -> str:
    """A result as stored: one letter for Lua, then JSON."""
    return ("c" if result.status == "completed" else "f") + result.to_json()


def change_args(changes: Changes) -> tuple[list[Any], int]:
    """Results and events as `apply_changes` reads them, and the bytes of the results."""
    args: list[Any] = [len(changes.results)]
    size = 0
    for result in changes.results:
        payload = payload_of(result)
        size += len(payload)
        args += (result.tool_call_id, payload)
    args.append(len(changes.events))
    for event in changes.events:
        args += (event.type.value, event_data(event))
    return args, size


def event_data(event: NewEvent) -> str:
    """An event's data as compact JSON."""
    return to_json(event.data).decode() if event.data else "{}"


def granted_from(task: TaskDefinition, reply: Sequence[str]) -> Granted:
    """The answer ``run`` of `claim`."""
    dead = None
    if reply[4] == "starts":
        dead = ErrorInfo(
            code="too_many_starts",
            message="the job was started too often without an end: its workers died or were cut off while it ran. "
            f"Look at the workers' logs, then run it again with POST /api/v1/dead-letters/{task.job_id}/redrive",
        )
    elif reply[4] == "stale":
        dead = ErrorInfo(
            code="stale",
            message="the message is older than the time for which results are kept and has no record, so it may have "
            f"run already; if it has not, run it with POST /api/v1/dead-letters/{task.job_id}/redrive",
        )
    calls = reply[5:]
    return Granted(
        job_id=task.job_id,
        generation=task.generation,
        fence=int(reply[1]),
        retries=int(reply[2]),
        remaining_ms=int(reply[3]),
        done={c[1:]: "completed" if c[0] == "c" else "failed" for c in calls if c[0] in "cf"},
        marked=frozenset(c[1:] for c in calls if c[0] == "m"),
        dead=dead,
    )


def record_from(job_id: str, fields: Mapping[str, str]) -> JobRecord:
    """A record from its hash.

    Raises:
        StoreError: it was written by a newer version of toolfleet.
    """
    if int(fields.get("v", 1)) > RECORD_VERSION:
        raise StoreError(f"the record of {job_id} has version {fields['v']}; this program knows {RECORD_VERSION}")

    if "task" not in fields:
        raise StoreError(f"the record of {job_id} is damaged: it holds no task; the reconciler ends it as lost")

    def number(name: str) -> int | None:
        return int(float(fields.get(name) or 0)) or None

    status = Status(fields["status"])
    running, waiting = status is Status.RUNNING, status is Status.QUEUED
    # An ending leaves what only a live attempt means as it was: clearing it would cost every job.
    return JobRecord(
        job_id=job_id,
        task=TaskDefinition.from_json(fields["task"]),
        status=status,
        generation=int(fields["generation"]),
        fence=number("fence") or 0,
        starts=number("starts") or 0,
        retries=number("retries") or 0,
        created_at=int(fields["created"]),
        started_at=number("started"),
        finished_at=number("finished"),
        next_attempt_at=number("not_before") if waiting else None,
        lease_until=number("lease_until") if running else None,
        worker=(fields.get("worker") or None) if running else None,
        cancel_requested="cancel" in fields,
        error=ErrorInfo.model_validate_json(fields["error"]) if fields.get("error") else None,
        completed_calls=number("done") or 0,
        failed_calls=number("failed") or 0,
        current_tool=(fields.get("tool") or None) if running else None,
        stage=fields.get("stage") or None,
        percent=100.0 if status is Status.COMPLETED else float(fields.get("percent") or 0),
        message=fields.get("message") or None,
        undecided=tuple(sorted(name[2:] for name in fields if name.startswith("u:"))),
        decisions=tuple(
            CallDecision.model_validate_json(fields[name]) for name in sorted(fields) if name.startswith("d:")
        ),
        last_event=number("seq") or 0,
    )


def record_of(task: TaskDefinition, created_at: int, status: Status, generation: int) -> JobRecord:
    """The record of a task just published, without reading it back: new, or claimed by a worker in the meantime."""
    due = max(task.run_at or 0, created_at + task.delay_ms if task.delay_ms else 0)
    return JobRecord(
        job_id=task.job_id,
        task=task,
        status=status,
        generation=generation,
        created_at=created_at,
        next_attempt_at=due if due > created_at and status is Status.QUEUED else None,
        last_event=1,
    )


def events_from(job_id: str, text: str) -> list[JobEvent]:
    """The events of one write, from its log entry or its Pub/Sub message: each
    ``<id>\\n<type>\\n<attempt>\\n<generation>\\n<at>\\n<data>``, separated by U+001E."""
    return [_event(job_id, part) for part in text.split("\x1e")]


def _event(job_id: str, text: str) -> JobEvent:
    seq, kind, attempt, generation, at, data = text.split("\n", 5)
    values = json.loads(data)
    for told in (values, *values.get("decisions", ())):
        for name in [name for name in told if name.endswith("_at_ms")]:
            told[name.removesuffix("_ms")] = iso_time(told.pop(name))
    return JobEvent(
        id=int(seq),
        type=EventType(kind),
        job_id=job_id,
        generation=int(generation),
        attempt=int(attempt),
        at=int(at),
        data=values,
    )
