"""What the core needs of the outside, as small Protocols: a store and a tool runner; the queue's are in
`queue_ports`.

The adapters (`redis_state_manager`, `tool_execution`) are handed in by `toolfleet.bootstrap`;
worker, executor and service know only what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from toolfleet.services.background_jobs.task_models import (
    ErrorInfo,
    JobEvent,
    JobRecord,
    Millis,
    NewEvent,
    Status,
    TaskDefinition,
    Tier,
    ToolCall,
    ToolResult,
)
from toolfleet.services.background_jobs.transitions import CallStop, Ending

# -- the store: values ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """The claim succeeded: this attempt holds the job until its lease ends."""

    job_id: str
    generation: int
    fence: int
    retries: int
    remaining_ms: int
    """Running time left to the job."""
    done: Mapping[str, Literal["completed", "failed"]]
    """Calls with a stored result of an earlier attempt: they are not run again (G4)."""
    marked: frozenset[str]
    """Calls that must not run twice, were started, and have no result: they are not run either (G5)."""
    dead: ErrorInfo | None = None
    """Set where the attempt is to end as a dead letter at once instead of running (G9)."""


@dataclass(frozen=True, slots=True)
class Over:
    """Nothing to do: the job is terminal, cancelled just now, or the message is of an older generation. Ack.

    Reason `conflict`: the message is another job's than the record of its id.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class NotNow:
    """Somebody holds a live lease, or the job is not due. Nak with the delay."""

    delay_ms: int
    reason: str


ClaimAnswer = Granted | Over | NotNow


@dataclass(frozen=True, slots=True)
class Lease:
    """What names an attempt in every write it makes."""

    job_id: str
    fence: int


RenewAnswer = Literal["held", "cancel", "lost"]
WriteAnswer = Literal["ok", "lost"]
RetryAnswer = Literal["ok", "cancelled", "lost"]
MarkAnswer = Literal["ok", "cancel", "lost"]


@dataclass(frozen=True, slots=True)
class Changes:
    """What an attempt has to tell: results, events and the latest progress, written together."""

    results: tuple[ToolResult, ...] = ()
    events: tuple[NewEvent, ...] = ()
    current_tool: str | None = None
    stage: str | None = None
    percent: float | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class CancelAnswer:
    """How a cancel request found the job."""

    found: Literal["absent", "cancelled_now", "running", "already_cancelled", "ended"]
    status: Status | None = None
    tier: Tier | None = None
    worker: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    """What `job.cancelled` tells, where this has cancelled the job."""


@dataclass(frozen=True, slots=True)
class ReopenAnswer:
    """The answer of a reopening: `task` is what to publish, if there is something to run."""

    verdict: Literal[
        "reopened", "closed", "waiting", "absent", "answered", "not_allowed", "no_such_call", "decided_already"
    ]
    status: Status | None = None
    task: TaskDefinition | None = None
    generation: int = 0
    """That stands now; 0 where it was not asked for, or where there is no record."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier at one moment."""

    queued: int
    running: int
    oldest_age_ms: int
    """Of the oldest queued job; 0 where none waits."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's last heartbeat."""

    worker_id: str
    tier: Tier
    host: str
    pid: int
    started_at: Millis
    seen_at: Millis
    slots: int
    in_flight: int
    done: int
    version: str
    state: str


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The fleet's figures."""

    tiers: Mapping[Tier, TierStats]
    totals: Mapping[Status, int]
    """Jobs that reached each terminal status since the store was made, and those queued and running now."""
    finished_last_minute: int
    finished_last_15_minutes: int
    leases_lost: int


@dataclass(frozen=True, slots=True)
class JobPage:
    """Jobs from the newest to the oldest."""

    jobs: Sequence[JobRecord]
    cursor: str | None
    """Where the next page begins; None on the last one."""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A job that is due or whose lease ran out, as the reconciler compares it."""

    job_id: str
    status: Status
    generation: int
    fence: int
    task: TaskDefinition | None
    trouble: Literal["queued", "lease_expired", "stuck", "overrun"] = "queued"
    """What is wrong: it is due; its lease ran out, or did so long ago; its lease is renewed, and it runs far longer
    than its running time allows."""


class AttemptStore(Protocol):
    """What a running attempt writes before its end. Every write is under its fence and safe to repeat."""

    async def mark_start(self, lease: Lease, call: ToolCall, lease_ms: int) -> MarkAnswer:
        """Step 4: write the start of a call that must not run twice, under fence and live lease, and renew it."""

    async def withdraw_mark(self, lease: Lease, tool_call_id: str) -> WriteAnswer:
        """Take the mark of a call back that was surely not sent."""

    async def progress(self, lease: Lease, changes: Changes, wseq: int) -> WriteAnswer:
        """Store results and events of a running attempt. `wseq` grows with each of its writes; a repeated one, after
        a lost answer, changes nothing."""


class JobStore(AttemptStore, Protocol):
    """State, results and events of jobs. Every write is conditional and safe to repeat.

    Every method raises `StoreUnavailable` where the store does not answer within its bound.
    """

    async def enqueue(self, task: TaskDefinition) -> tuple[JobRecord, bool]:
        """Make the record of a published task if there is none; answers what stands, and whether it is new."""

    async def claim(
        self, task: TaskDefinition, *, token: str, worker: str, lease_ms: int, published_at: Millis | None
    ) -> ClaimAnswer:
        """Step 3. The same token gets the same answer again. `published_at` is None for a synchronous run."""

    async def renew(self, leases: Sequence[Lease], lease_ms: int) -> Sequence[RenewAnswer]:
        """Step 5, for all jobs of a worker in one round trip."""

    async def finish(self, lease: Lease, ending: Ending, changes: Changes) -> WriteAnswer:
        """Step 6: status, results, events, counters, expiry and publish at once, under the fence."""

    async def retry(self, lease: Lease, delay_ms: int, error: ErrorInfo, changes: Changes) -> RetryAnswer:
        """Step 8: back to queued with a due time; a cancel request wins."""

    async def hand_back(self, lease: Lease, changes: Changes) -> RetryAnswer:
        """Give the job back unfinished: no start and no retry is counted; a cancel request wins."""

    async def cancel(self, job_id: str, reason: str, task: TaskDefinition | None = None) -> CancelAnswer:
        """Step 10. `task` makes the record where there is none."""

    async def reopen(self, job_id: str, reason: str, by: str = "") -> ReopenAnswer:
        """Step 11 for a failed or cancelled job: a new generation that runs the calls that did not succeed."""

    async def redrive(self, letter: TaskDefinition, fence: int, keep_ms: int, note: str, by: str) -> ReopenAnswer:
        """Step 11 for the newest dead letter of a job, written under `fence`. Where the record is gone, the letter's
        task makes a new one, a generation later. A letter is answered once, as long as it may stand (`keep_ms`)."""

    async def resolve(
        self,
        job_id: str,
        tool_call_id: str,
        decision: Literal["rerun", "completed", "failed"],
        result: ToolResult | None,
        note: str,
        by: str = "",
    ) -> ReopenAnswer:
        """Decide one call of an unknown job; the last decision opens the new generation."""

    async def get(self, job_id: str) -> JobRecord | None:
        """The record, or None."""

    async def expired(self, job_id: str) -> bool:
        """Whether something still proves that a job of this id ended and its record is gone; False where nothing
        does, which is no proof that there never was one."""

    async def results(self, job_id: str) -> Mapping[str, ToolResult]:
        """The stored results by tool_call_id."""

    async def events(self, job_id: str, after: int = 0, limit: int = 500) -> Sequence[JobEvent]:
        """The log after an id, in order; fewer than asked where the log ends."""

    async def jobs(
        self, tenant: str, status: Status | None, tier: Tier | None, cursor: str | None, limit: int
    ) -> JobPage:
        """A page of a tenant's jobs, newest first."""

    async def stats(self) -> StoreStats:
        """Counts and ages."""

    async def orphans(self, partition: int, limit: int, stuck_ms: int) -> Sequence[Orphan]:
        """Queued jobs that are due, running jobs whose lease ran out, and those that run `stuck_ms` longer than they
        may, of one partition."""

    async def reclaim(self, orphan: Orphan) -> Literal["publish", "settled", "changed"]:
        """Step 12: make an orphan ready to be published again, if status, fence and generation still stand."""

    async def end_overrun(self, orphan: Orphan, stuck_ms: int) -> Literal["settled", "changed"]:
        """Step 12: end a run that goes on so much longer than its running time allows, if it still is that run."""

    async def prune(self, partition: int, limit: int) -> int:
        """Drop expired jobs from the indexes; the number dropped."""

    async def heartbeat(self, info: WorkerInfo, ttl_s: float) -> None:
        """Say that a worker is alive."""

    async def retire(self, worker_id: str) -> None:
        """A worker has ended in order."""

    async def workers(self) -> Sequence[WorkerInfo]:
        """The workers whose heartbeat has not run out."""

    async def ping(self) -> None:
        """Raises `StoreUnavailable` where the store does not answer."""


class EventFeed(Protocol):
    """Wakes readers when a job's log has grown. It may drop messages: readers read the log, not the feed."""

    def watch(self, job_id: str) -> AbstractAsyncContextManager[Watch]:
        """Subscribed when the context is entered."""


class Watch(Protocol):
    """One reader's wake-ups for one job."""

    async def changed(self, timeout: float) -> Sequence[JobEvent] | None:
        """Events pushed since the last call; an empty answer asks for a read of the log; None on time-out."""

    @property
    def connected(self) -> bool:
        """Whether pushes arrive at present."""


# -- tools ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the catalogue knows it."""

    name: str
    """As the fleet calls it: ``tool``, or ``server/tool`` where the plain name is not unique."""
    server: str
    tool: str
    description: str = ""
    input_schema: Mapping[str, Any] = field(default_factory=dict)
    repeatable: bool = False
    """Read-only or idempotent: it may run again after an attempt whose outcome is not known."""
    policy_source: Literal["annotation", "default", "setting"] = "default"
    """Who says so: the tool's own annotations, their defaults where it says nothing, or `Settings.tool_policy`."""


class ProgressSink(Protocol):
    """Takes a call's progress; called in the event loop, must not block."""

    def __call__(self, progress: float, total: float | None, message: str | None, dropped: int = 0, /) -> None:
        """As the tool sent it; `dropped` notifications were left out before this one."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a runner is told about the attempt that makes a call."""

    job_id: str
    attempt: int
    idempotency_key: str
    """``job_id:tool_call_id``: the same in every attempt."""
    timeout_s: float
    on_progress: ProgressSink
    before_send: Callable[[], None] = lambda: None
    """To be called right before the call may reach the tool, each time it is sent: from then on its outcome is not
    known without an answer. Raises `LeaseLost` where the attempt may have lost its lease, and nothing may be sent."""
    on_stop: Callable[[CallStop], None] = lambda _: None
    """To be called with what is known where the call's task was cancelled, before the cancellation goes on. A runner
    that says nothing is taken to have told nobody."""


class ToolRunner(Protocol):
    """Runs tool calls."""

    async def describe(self, tool_name: str) -> ToolSpec:
        """The tool's spec.

        Raises:
            UnknownTool: no server offers it.
            ToolUnavailable: it is not known and a server that may offer it can't be reached.
        """

    async def run(self, spec: ToolSpec, call: ToolCall, context: CallContext) -> ToolResult:
        """Run one call, with ``context.before_send`` before it is sent. Cancelling the task tells the tool's server,
        and ``context.on_stop`` how far that got, within less than a second.

        Raises:
            ToolFailure: one of its subclasses; `sent` and `answered` say what is known of the outcome.
        """

    async def close(self) -> None:
        """End all sessions and child processes."""


class ToolCatalogue(Protocol):
    """What the fleet can call, for checks before anything is queued."""

    async def find(self, tool_name: str) -> ToolSpec:
        """The spec of a tool.

        Raises:
            UnknownTool: with the nearest names in ``details["nearest"]``.
            ToolUnavailable: no tool server was ever reached.
        """

    async def tools(self) -> Sequence[ToolSpec]:
        """All tools, by name."""
