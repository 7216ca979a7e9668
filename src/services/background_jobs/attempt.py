"""One attempt: runs the calls of a job that have no result, tells their progress, and ends in one outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from toolfleet.services.background_jobs.attempt_log import AttemptLog
from toolfleet.services.background_jobs.call_run import CallOutcome, CallRules, run_call
from toolfleet.services.background_jobs.errors import LeaseLost, StoreUnavailable
from toolfleet.services.background_jobs.last_words import LastWords, LastWrite
from toolfleet.services.background_jobs.ports import AttemptStore, Changes, Granted, Lease, ToolRunner, ToolSpec
from toolfleet.services.background_jobs.result_budget import ResultBudget
from toolfleet.services.background_jobs.retry_policy import RetryPolicy
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_lease import Held
from toolfleet.services.background_jobs.task_models import ErrorInfo, TaskDefinition, ToolCall
from toolfleet.services.background_jobs.transitions import CallEnd, CallStop, Outcome, Stop, StoppedCall, conclude

log = structlog.get_logger(__name__)

STOP_GRACE_S = 3.0
"""For stopped calls to tell their servers and end; a call that takes longer is left behind and reported. It is
cancelled once more after this time, and by its own time-out at the end of that. A call of an MCP server always ends
here: the session gives it up within a second. A function of this process that swallows all of that goes on until it
returns."""
CANCEL_GRACE_S = 0.8
"""The same where somebody waits for the answer: a cancel's comes within 1 s and is to say what has not stopped."""


@dataclass(frozen=True, slots=True)
class AttemptRules:
    """What every attempt of a process is run by."""

    lease_ms: int
    call_timeout_s: float
    calls_at_once: int
    progress_interval_s: float
    retries: RetryPolicy
    max_result_bytes: int = 64 << 20
    """Of all results of an attempt."""


class Attempt:
    """Runs a claimed job."""

    def __init__(
        self,
        task: TaskDefinition,
        granted: Granted,
        *,
        store: AttemptStore,
        gate: StoreGate,
        runner: ToolRunner,
        rules: AttemptRules,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.task = task
        self.lease = Lease(granted.job_id, granted.fence)
        self._granted = granted
        self._store = store
        self._gate = gate
        self._runner = runner
        self._rules = rules
        self._clock = clock
        self._held: Held | None = None
        self._budget = ResultBudget(rules.max_result_bytes)
        self._ends: dict[str, CallEnd] = {}
        self._errors: dict[str, ErrorInfo] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._marked: set[str] = set()
        self._sent: set[str] = set()
        self._withdrawn: list[str] = []
        self._told: dict[str, CallStop] = {}
        self._stop: Stop | None = None
        self._open_calls = 0
        self._over: asyncio.Future[None] | None = None
        self._log = AttemptLog(
            store, gate, self.lease, task, granted, rules.progress_interval_s, on_lost=lambda: self.stop(Stop.LOST)
        )

    @property
    def retries(self) -> int:
        """Retries of the job before this attempt."""
        return self._granted.retries

    def last_words(self, last: LastWrite) -> LastWords:
        """All that is still to be written, when the attempt has run."""
        return LastWords(self.lease, last, self._log.unanswered, tuple(self._withdrawn))

    def results_left(self, changes: Changes) -> LastWrite | None:
        """What `run` gave, for an attempt that was lost: its results, where there are any."""
        return self._log.left(changes)

    @property
    def stopped_by(self) -> Stop | None:
        """Why it was stopped from outside, if it was."""
        return self._stop

    def stop(self, why: Stop) -> None:
        """End the calls. The first word counts, but a lost lease overrules all: it forbids every further write."""
        if self._stop is None and why is Stop.CANCEL:
            self._log.cancelling()
        if self._stop is None or why is Stop.LOST:
            self._stop = why
        self._wake()

    def _wake(self) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    async def run(self, held: Held) -> tuple[Outcome, Changes]:
        """Run what is to be run; the outcome, and what is still to be written with it."""
        self._held = held
        self._note_earlier_attempts()
        loop = asyncio.get_running_loop()
        slots = asyncio.Semaphore(self._rules.calls_at_once)
        for call in self.task.tools:
            if call.tool_call_id not in self._ends:
                task = loop.create_task(self._one(call, slots))
                task.add_done_callback(self._call_done)
                self._tasks[call.tool_call_id] = task
        timer = loop.call_later(self._granted.remaining_ms / 1000, self.stop, Stop.TIMEOUT)
        try:
            await self._until_over()
        except BaseException:
            for task in self._tasks.values():
                task.cancel()
            raise
        finally:
            timer.cancel()
        await self._withdraw_unsent()
        return self._conclude(), await self._log.take()

    def _call_done(self, _: asyncio.Task[None]) -> None:
        self._open_calls -= 1
        if self._open_calls == 0:
            self._wake()

    def _note_earlier_attempts(self) -> None:
        for call in self.task.tools:
            if done := self._granted.done.get(call.tool_call_id):
                self._ends[call.tool_call_id] = CallEnd(done)
            elif call.tool_call_id in self._granted.marked:
                self._ends[call.tool_call_id] = CallEnd.UNKNOWN

    async def _until_over(self) -> None:
        """Wait for all calls, or stop them; those that do not end although they were stopped are left behind."""
        loop = asyncio.get_running_loop()
        self._open_calls = len(self._tasks)
        if self._open_calls and self._stop is None:
            self._over = loop.create_future()
            await self._over
        running = {name: task for name, task in self._tasks.items() if not task.done()}
        if not running:
            return
        for task in running.values():
            task.cancel()
        await asyncio.wait(running.values(), timeout=CANCEL_GRACE_S if self._stop is Stop.CANCEL else STOP_GRACE_S)
        if left := {name: task for name, task in running.items() if not task.done()}:
            log.warning("attempt.calls_left_behind", job_id=self.task.job_id, calls=sorted(left))
            for task in left.values():
                loop.call_later(STOP_GRACE_S, task.cancel)

    async def _one(self, call: ToolCall, slots: asyncio.Semaphore) -> None:
        async with slots:
            started = self._clock()
            try:
                outcome = await run_call(
                    self._runner,
                    call,
                    job_id=self.task.job_id,
                    attempt=self.lease.fence,
                    rules=CallRules(self._rules.call_timeout_s, self._may_retry()),
                    on_progress=partial(self._log.progress, call),
                    begin=self._begin,
                    before_send=lambda: self._before_send(call),
                    on_stop=lambda state: self._on_stop(call, state),
                    withdraw=self._withdraw,
                )
            except LeaseLost:
                self.stop(Stop.LOST)
                return
            except Exception:
                # The store refused a write: without it nothing may be concluded, so the job is left to its lease.
                log.exception("attempt.broken", job_id=self.task.job_id, tool_call_id=call.tool_call_id)
                self.stop(Stop.LOST)
                return
        self._end(call, outcome, int((self._clock() - started) * 1000))

    def _may_retry(self) -> bool:
        return self._rules.retries.allows(self._granted.retries, self.task.max_retries)

    async def _begin(self, call: ToolCall, spec: ToolSpec) -> None:
        """Before a call is sent. The start of one that must not run twice is written and answered first (step 4)."""
        if spec.repeatable:
            self._log.started(call)
        else:
            asked_at = self._clock()
            self._marked.add(call.tool_call_id)
            answer = await self._gate.insist(lambda: self._store.mark_start(self.lease, call, self._rules.lease_ms))
            if answer == "cancel":
                self.stop(Stop.CANCEL)
                await asyncio.Event().wait()  # this call's task is cancelled by `_until_over`
            if answer == "lost":
                raise LeaseLost
            if self._held is not None:
                self._held.deadline = max(self._held.deadline, asked_at + self._rules.lease_ms / 1000)

    def _before_send(self, call: ToolCall) -> None:
        # The last check before the call, by our own clock: a process that was stopped since its mark, or that waited
        # for a session with the tool's server, sees it here.
        if self._held is not None and self._clock() >= self._held.deadline:
            raise LeaseLost
        self._sent.add(call.tool_call_id)

    def _on_stop(self, call: ToolCall, state: CallStop) -> None:
        self._told[call.tool_call_id] = state
        if state is CallStop.NOT_SENT:
            self._sent.discard(call.tool_call_id)

    async def _withdraw_unsent(self) -> None:
        """A call that was stopped between its mark and its sending may run: the next attempt must not take it for one
        whose outcome is not known."""
        for call in self.task.tools:
            if self._stop is Stop.LOST or call.tool_call_id not in self._marked - self._sent:
                continue
            self._marked.discard(call.tool_call_id)
            try:
                await self._store.withdraw_mark(self.lease, call.tool_call_id)
            except StoreUnavailable as error:
                self._gate.shut(error)
                self._withdrawn.append(call.tool_call_id)

    async def _withdraw(self, call: ToolCall) -> None:
        self._sent.discard(call.tool_call_id)
        await self._gate.insist(lambda: self._store.withdraw_mark(self.lease, call.tool_call_id))
        # Not before: an attempt that is stopped while this waits for the store leaves it to `_withdraw_unsent`.
        self._marked.discard(call.tool_call_id)

    def _end(self, call: ToolCall, outcome: CallOutcome, duration_ms: int) -> None:
        if len(self.task.tools) > 1:
            outcome = self._budget.take(call, outcome)
        self._ends[call.tool_call_id] = outcome.end
        if outcome.error is not None:
            self._errors[call.tool_call_id] = outcome.error
        last = len(self._ends) == len(self.task.tools)
        self._log.ended(call, outcome, duration_ms, flush=not last)

    def _conclude(self) -> Outcome:
        ends = dict(self._ends)
        stopped = [
            StoppedCall(call.tool_call_id, call.tool_name, self._how_stopped(call.tool_call_id))
            for call in self.task.tools
        ]
        for call in self.task.tools:
            name = call.tool_call_id
            if name not in ends:
                # A call that must not run twice and was cut off by a time-out has an unknown outcome.
                once = name in self._sent and self._log.runs_once(name)
                ends[name] = CallEnd.UNKNOWN if once and self._stop is Stop.TIMEOUT else CallEnd.STOPPED
        return conclude(
            ends,
            self._errors,
            stop=self._stop,
            stopped=stopped,
            timeout_s=self.task.timeout_ms / 1000,
        )

    def _how_stopped(self, name: str) -> CallStop:
        end = self._ends.get(name)
        if end is CallEnd.UNKNOWN:
            return CallStop.NOT_TOLD
        if end is not None:
            return CallStop.ENDED
        if name not in self._sent:
            return CallStop.NOT_SENT
        # What has ended without a word of its runner is not known to have been told.
        return self._told.get(name, CallStop.NOT_TOLD if self._tasks[name].done() else CallStop.TOLD)
