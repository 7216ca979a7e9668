"""The legal moves of a job, one constructor each, and how the outcomes of its calls become one.

The functions of `lua/` make the moves; this module is the table that they, the diagram in README.md and the tests are
held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from toolfleet.services.background_jobs.task_models import ErrorInfo, EventType, NewEvent, Status

LEGAL_MOVES: Final[frozenset[tuple[Status | None, Status]]] = frozenset(
    {
        (None, Status.QUEUED),  # enqueue, or a claim that finds no record
        (Status.QUEUED, Status.RUNNING),  # claim
        (Status.QUEUED, Status.CANCELLED),  # cancel before a claim
        (Status.QUEUED, Status.FAILED),  # expired, out of time, lost
        (Status.QUEUED, Status.UNKNOWN),  # nothing left to run but a started call without a result
        (Status.RUNNING, Status.RUNNING),  # a claim after the lease ran out
        (Status.RUNNING, Status.QUEUED),  # retry, hand back, reclaim
        (Status.RUNNING, Status.COMPLETED),
        (Status.RUNNING, Status.FAILED),
        (Status.RUNNING, Status.CANCELLED),
        (Status.RUNNING, Status.UNKNOWN),
    }
)
"""Moves within a generation. Nothing leaves a terminal status (G3)."""

REOPENING_MOVES: Final[frozenset[tuple[Status, Status]]] = frozenset(
    {
        (Status.FAILED, Status.QUEUED),  # retry, redrive
        (Status.CANCELLED, Status.QUEUED),  # retry
        (Status.UNKNOWN, Status.QUEUED),  # resolve: something is to be run again
        (Status.UNKNOWN, Status.COMPLETED),  # resolve, or the attempt's own late answer
        (Status.UNKNOWN, Status.FAILED),
    }
)
"""Moves into a new generation."""


class Stop(StrEnum):
    """Why an attempt was stopped from outside."""

    CANCEL = "cancel"
    """Somebody asked for it."""
    TIMEOUT = "timeout"
    """The job's running time is used up."""
    DRAIN = "drain"
    """The worker is leaving."""
    LOST = "lost"
    """The lease could not be renewed in time, or another attempt holds the job."""


class CallStop(StrEnum):
    """How far a stop got with one call. Whether a tool has stopped is said, never assumed (G8)."""

    ENDED = "ended"
    """It had come to an end before, with or without a result."""
    NOT_SENT = "not_sent"
    """It never reached its tool."""
    STOPPED = "stopped"
    """It surely runs no more: the server gave its result after all or closed the stream of the answer, the server's
    process ended, or the function returned."""
    TOLD = "told"
    """The server has been told, as its protocol version asks, or the function was cancelled; it has not shown that it
    stopped, which the protocol does not ask of it."""
    NOT_TOLD = "not_told"
    """It was or may have been sent, and its server has not been told: the connection is gone, the server takes nothing,
    or the worker has died or does not answer."""

    @property
    def may_run(self) -> bool:
        """Whether the tool may still be running."""
        return self in (CallStop.TOLD, CallStop.NOT_TOLD)


@dataclass(frozen=True, slots=True)
class StoppedCall:
    """One call of a job that was stopped."""

    tool_call_id: str
    tool_name: str
    state: CallStop


class CallEnd(StrEnum):
    """How one call of an attempt ended."""

    COMPLETED = "completed"
    """With a result."""
    FAILED = "failed"
    """For good."""
    RETRY = "retry"
    """It failed, may run again, and there is a retry left."""
    UNKNOWN = "unknown"
    """It must not run twice, was sent, and its outcome is not known."""
    STOPPED = "stopped"
    """It was stopped from outside, or never begun."""


@dataclass(frozen=True, slots=True)
class Completed:
    """Every call has a result."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A call failed for good, or the job's time is up."""

    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Retry:
    """Another attempt is to follow."""

    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Stopped on request."""

    calls: tuple[StoppedCall, ...] = ()
    """Every call of the job."""

    @property
    def reached(self) -> str:
        """How far the request got: `tool` (a tool's server was told) or `worker` (there was none to tell, or none that
        could be told)."""
        told = any(call.state in (CallStop.TOLD, CallStop.STOPPED) for call in self.calls)
        return "tool" if told else "worker"

    @property
    def still_running(self) -> tuple[str, ...]:
        """Calls whose tool may still be running."""
        return tuple(call.tool_call_id for call in self.calls if call.state.may_run)


@dataclass(frozen=True, slots=True)
class Unknown:
    """Calls that a person must decide."""

    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HandedBack:
    """The worker leaves; somebody else goes on."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The attempt no longer holds the job: it neither writes nor acks."""


Outcome = Completed | Failed | Retry | Cancelled | Unknown | HandedBack | Lost


@dataclass(frozen=True, slots=True)
class Ending:
    """A terminal status with its reason, made by the constructors of `transitions`."""

    status: Status
    event: NewEvent
    error: ErrorInfo | None = None
    undecided: tuple[str, ...] = ()
    """Calls whose outcome is not known, for `unknown`."""


def conclude(
    ends: Mapping[str, CallEnd],
    errors: Mapping[str, ErrorInfo],
    *,
    stop: Stop | None,
    stopped: Sequence[StoppedCall] = (),
    timeout_s: float = 0,
) -> Outcome:
    """One outcome from the ends of all calls of a job, those of earlier attempts included.

    The order matters: a lost lease forbids every write; a cancel is a person's word; an unknown outcome waits until
    the calls that may run again have run.
    """
    if stop is None and all(end is CallEnd.COMPLETED for end in ends.values()):
        return Completed()
    by_end = {end: [call for call, e in ends.items() if e is end] for end in CallEnd}
    open_calls = by_end[CallEnd.STOPPED]
    if stop is Stop.LOST or (open_calls and stop is None):
        return Lost()
    if stop is Stop.CANCEL and (open_calls or by_end[CallEnd.RETRY] or by_end[CallEnd.UNKNOWN]):
        return Cancelled(tuple(stopped))
    if stop is Stop.DRAIN and open_calls:
        return HandedBack()
    if by_end[CallEnd.RETRY] and stop in (None, Stop.DRAIN):
        return Retry(errors[by_end[CallEnd.RETRY][0]])
    if by_end[CallEnd.UNKNOWN]:
        return Unknown(tuple(by_end[CallEnd.UNKNOWN]))
    if stop is Stop.TIMEOUT and open_calls:
        text = f"the job ran longer than its timeout of {timeout_s:g} s; raise timeout_seconds or split it"
        return Failed(ErrorInfo(code="timeout", message=text, tool_call_id=open_calls[0]))
    if by_end[CallEnd.RETRY]:
        return Failed(errors[by_end[CallEnd.RETRY][0]])
    if failed := by_end[CallEnd.FAILED]:
        return Failed(_failed_calls(failed, errors, len(ends)))
    return Completed()


def _failed_calls(failed: Sequence[str], errors: Mapping[str, ErrorInfo], total: int) -> ErrorInfo:
    first = errors.get(failed[0])
    reason = first.message if first else "see its result"
    code = first.code if first and total == 1 else "tool_failed"
    return ErrorInfo(
        code=code,
        message=f"{len(failed)} of {total} calls failed; {failed[0]}: {reason}",
        tool_call_id=failed[0],
    )


def completed(calls: int) -> Ending:
    """running -> completed."""
    data = {"status": Status.COMPLETED.value, "completed_tools": calls, "failed_tools": 0}
    return Ending(Status.COMPLETED, NewEvent(EventType.JOB_COMPLETED, data))


def failed(error: ErrorInfo) -> Ending:
    """running -> failed."""
    data = {"status": Status.FAILED.value, "error": error.model_dump(exclude_none=True)}
    return Ending(Status.FAILED, NewEvent(EventType.JOB_FAILED, data), error)


def cancelled(outcome: Cancelled) -> Ending:
    """running -> cancelled, saying of each call how far the request got and what may still be running."""
    states = {call.state for call in outcome.calls}
    said = "nothing_was_running"
    if outcome.still_running:
        said = "not_confirmed"
    elif CallStop.STOPPED in states:
        said = "stopped"
    data = {
        "status": Status.CANCELLED.value,
        "reached": outcome.reached,
        "tool_stopped": said,
        "still_running": list(outcome.still_running),
        "calls": [
            {"tool_call_id": call.tool_call_id, "tool_name": call.tool_name, "state": call.state.value}
            for call in outcome.calls
        ],
    }
    return Ending(Status.CANCELLED, NewEvent(EventType.JOB_CANCELLED, data))


def unknown(job_id: str, calls: Sequence[str]) -> Ending:
    """running -> unknown: a person decides each of the calls."""
    error = ErrorInfo(
        code="outcome_unknown",
        message="a call that must not run twice was started and its outcome is not known; decide it with "
        f"POST /api/v1/jobs/{job_id}/resolve",
        tool_call_id=calls[0],
    )
    data = {
        "status": Status.UNKNOWN.value,
        "calls": list(calls),
        "error": error.model_dump(exclude_none=True),
    }
    return Ending(Status.UNKNOWN, NewEvent(EventType.JOB_UNKNOWN, data), error, tuple(calls))
