"""What an attempt has to tell, gathered and written in order.

Events of a quick call wait a moment, so that a job that is over at once is told in one write with its end. Progress is
coalesced: within an interval only the last state of a call is kept, and how many were dropped is said. Writes of one
attempt follow each other, each with a number that grows, so a write that is repeated changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from toolfleet.services.background_jobs.call_run import CallOutcome
from toolfleet.services.background_jobs.errors import StoreError
from toolfleet.services.background_jobs.last_words import ProgressWrite
from toolfleet.services.background_jobs.ports import AttemptStore, Changes, Granted, Lease
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_ending import end_tasks
from toolfleet.services.background_jobs.task_models import EventType, NewEvent, TaskDefinition, ToolCall, ToolResult
from toolfleet.services.background_jobs.transitions import CallEnd

log = structlog.get_logger(__name__)

STARTED_DELAY_S: Final = 0.02
"""A start is told after this, or with whatever is written before: no eye sees the difference."""
MAX_MESSAGE: Final = 500
"""Characters of a tool's progress message that are kept."""
MAX_NUMBER: Final = 1e15
"""Above it a double does not tell neighbouring whole numbers apart, and no tool counts that far."""


class _CallProgress:
    """The last state of one call that has not been written yet."""

    __slots__ = ("done", "dropped", "message", "total")

    def __init__(self, done: float | None, total: float | None, message: str | None, dropped: int) -> None:
        self.done = done
        self.total = total
        self.message = message
        self.dropped = dropped


class AttemptLog:
    """Gathers and writes the results, events and progress of one attempt."""

    def __init__(
        self,
        store: AttemptStore,
        gate: StoreGate,
        lease: Lease,
        task: TaskDefinition,
        granted: Granted,
        interval_s: float,
        on_lost: Callable[[], None],
    ) -> None:
        self._store = store
        self._gate = gate
        self._lease = lease
        self._task = task
        self._interval = interval_s
        self._on_lost = on_lost
        self._names = {call.tool_call_id: call.tool_name for call in task.tools}
        self._started: set[str] = set()
        self._fractions = dict.fromkeys(granted.done, 1.0)
        self._events: list[NewEvent] = []
        self._results: list[ToolResult] = []
        self._progress: dict[str, _CallProgress] = {}
        self._running: dict[str, str] = {}
        """Tool names of the calls that are being run, the one that was heard of last at the end."""
        self._message: str | None = None
        self._wseq = 0
        self.unanswered: ProgressWrite | None = None
        """The write whose answer has not come."""
        self._writing = asyncio.Lock()
        self._due: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._flusher: asyncio.Task[None] | None = None
        self._closed = False

    def runs_once(self, tool_call_id: str) -> bool:
        """Whether a call that was sent is one that must not run twice: its start is the store's to tell, not ours."""
        return tool_call_id not in self._started

    def started(self, call: ToolCall) -> None:
        """A call is about to be sent."""
        self._started.add(call.tool_call_id)
        self._heard_of(call)
        self._events.append(
            NewEvent(EventType.TOOL_STARTED, {"tool_call_id": call.tool_call_id, "tool_name": call.tool_name})
        )
        self._schedule(STARTED_DELAY_S)

    def cancelling(self) -> None:
        """A cancel request has reached the worker."""
        self._events.append(NewEvent(EventType.JOB_CANCELLING, {"reached": "worker"}))
        self._schedule(0)

    def progress(
        self, call: ToolCall, done: float, total: float | None, message: str | None, dropped: int = 0, /
    ) -> None:
        """A tool's own progress notification; `dropped` came before it and were left out.

        Numbers are told as they came, also negative ones and ones above the total; the percentage stays between 0 and
        100. Those that are no numbers, or above `MAX_NUMBER`, are told as null and don't move the percentage.
        """
        earlier = self._progress.get(call.tool_call_id)
        text = message[:MAX_MESSAGE] if message else None
        if earlier is not None:
            dropped += earlier.dropped + 1
        state = _CallProgress(_sane(done), _sane(total), text, dropped)
        self._progress[call.tool_call_id] = state
        if state.done is not None and state.total:
            self._fractions[call.tool_call_id] = min(1.0, max(0.0, state.done / state.total))
        self._heard_of(call)
        self._message = text or self._message
        self._schedule(self._interval)

    def ended(self, call: ToolCall, outcome: CallOutcome, duration_ms: int, *, flush: bool) -> None:
        """A call is over. Without `flush` what is gathered is left for the job's last write."""
        if self._closed:
            return
        self._tell_progress(call.tool_call_id)
        self._running.pop(call.tool_call_id, None)
        data: dict[str, object] = {
            "tool_call_id": call.tool_call_id,
            "tool_name": call.tool_name,
            "duration_ms": duration_ms,
        }
        if outcome.end is CallEnd.COMPLETED:
            kind = EventType.TOOL_COMPLETED
        else:
            kind = EventType.TOOL_FAILED
            data["will_retry"] = outcome.end is CallEnd.RETRY
            if outcome.end is CallEnd.UNKNOWN:
                data["outcome"] = "unknown"
            if outcome.error is not None:
                data["error"] = outcome.error.model_dump(exclude_none=True)
        if outcome.result is not None:
            self._results.append(outcome.result.model_copy(update={"duration_ms": duration_ms}))
            self._fractions[call.tool_call_id] = 1.0
        self._events.append(NewEvent(kind, data))
        if flush:
            self._schedule(0)

    def _heard_of(self, call: ToolCall) -> None:
        self._running.pop(call.tool_call_id, None)
        self._running[call.tool_call_id] = call.tool_name

    def _tell_progress(self, tool_call_id: str) -> None:
        state = self._progress.pop(tool_call_id, None)
        if state is None:
            return
        data: dict[str, object] = {
            "tool_call_id": tool_call_id,
            "tool_name": self._names[tool_call_id],
            "progress": state.done,
        }
        if state.total is not None:
            data["total"] = state.total
        if state.message is not None:
            data["message"] = state.message
        if state.dropped:
            data["coalesced"] = state.dropped
        self._events.append(NewEvent(EventType.TOOL_PROGRESS, data))

    def _schedule(self, delay_s: float) -> None:
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + delay_s
        if self._due is not None:
            if self._due_at <= at:
                return
            self._due.cancel()
        self._due_at = at
        self._due = loop.call_at(at, self._flush_now)

    def _flush_now(self) -> None:
        self._due = None
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush(), name=f"{self._lease.job_id}:events")
        else:
            # One write is on its way; the next one follows it at once.
            self._flusher.add_done_callback(lambda _: self._schedule(0))

    async def _flush(self) -> None:
        async with self._writing:
            changes = self._gather()
            if not changes.events and not changes.results:
                return
            self._wseq += 1
            wseq = self._wseq
            self.unanswered = ProgressWrite(wseq, changes)
            try:
                answer = await self._gate.insist(lambda: self._store.progress(self._lease, changes, wseq))
            except StoreError as error:
                # Refused, not unreachable: what it says is kept for the next write, the job's last one at the latest,
                # whose refusal is heard.
                log.error("attempt.write_refused", job_id=self._lease.job_id, error=str(error))
                self._results[:0], self._events[:0] = changes.results, changes.events
                self.unanswered = None
                return
            self.unanswered = None
            if answer == "lost":
                self._on_lost()

    def _gather(self) -> Changes:
        for tool_call_id in list(self._progress):
            self._tell_progress(tool_call_id)
        current = next(reversed(self._running.values()), None)
        changes = Changes(
            results=tuple(self._results),
            events=tuple(self._events),
            current_tool=current,
            stage=f"running {current}" if current else None,
            percent=100 * sum(self._fractions.values()) / len(self._task.tools),
            message=self._message,
        )
        self._results, self._events = [], []
        return changes

    async def take(self) -> Changes:
        """What has not been written yet, for the job's last write; nothing is written here after this."""
        self._closed = True
        if self._due is not None:
            self._due.cancel()
        if self._writing.locked():
            await self._until_answered_or_shut()
        return self._gather()

    async def _until_answered_or_shut(self) -> None:
        """Wait for a write that is on its way. With a store that is away it is broken off and stays `unanswered`:
        otherwise nothing of the attempt could be brought to safety before the store is back."""
        flusher = self._flusher
        assert flusher is not None
        shut = asyncio.create_task(self._gate.wait_shut(), name=f"{self._lease.job_id}:shut")
        try:
            await asyncio.wait({flusher, shut}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks([flusher, shut])

    def left(self, changes: Changes) -> ProgressWrite | None:
        """What `take` gave, as a write of its own for an attempt that is given up; None where it holds no result."""
        if not changes.results and not (self.unanswered and self.unanswered.changes.results):
            return None
        return ProgressWrite(self._wseq + 1, changes)


def _sane(number: float | None) -> float | None:
    """A tool's number as JSON carries it: not NaN, infinite or absurdly large, which readers in other languages choke
    on."""
    return number if number is not None and abs(number) <= MAX_NUMBER else None
