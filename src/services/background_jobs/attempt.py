"""One attempt: runs the calls of a job that have no result, tells their progress, and ends in one outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from toolfleet.services.background_jobs.attempt_log import AttemptLog
from toolfleet.services.background_jobs.call_run import CallOutcome, CallRules, run_call
from toolfleet.services.background_jobs.errors import LeaseLost
from toolfleet.services.background_jobs.ports import AttemptStore, Changes, Granted, Lease, ToolRunner, ToolSpec
from toolfleet.services.background_jobs.retry_policy import RetryPolicy
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_lease import Held
from toolfleet.services.background_jobs.task_models import ErrorInfo, TaskDefinition, ToolCall
from toolfleet.services.background_jobs.transitions import CallEnd, Outcome, Stop, conclude

log = structlog.get_logger(__name__)

STOP_GRACE_S = 3.0
"""For stopped calls to tell their servers and end; a call that takes longer is left behind and reported."""


@dataclass(frozen=True, slots=True)
class AttemptRules:
    """What every attempt of a process is run by."""

    lease_ms: int
    call_timeout_s: float
    calls_at_once: int
    progress_interval_s: float
    retries: RetryPolicy


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
        self._ends: dict[str, CallEnd] = {}
        self._errors: dict[str, ErrorInfo] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._marked: set[str] = set()
        self._sent: set[str] = set()
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
            still_running = await self._until_over()
        finally:
            timer.cancel()
            for task in self._tasks.values():
                task.cancel()
        await self._withdraw_unsent()
        return self._conclude(still_running), await self._log.take()

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

    async def _until_over(self) -> list[str]:
        """Wait for all calls, or stop them; the calls that did not end although they were stopped."""
        self._open_calls = len(self._tasks)
        if self._open_calls and self._stop is None:
            self._over = asyncio.get_running_loop().create_future()
            await self._over
        running = {name: task for name, task in self._tasks.items() if not task.done()}
        if not running:
            return []
        for task in running.values():
            task.cancel()
        await asyncio.wait(running.values(), timeout=STOP_GRACE_S)
        left = [name for name, task in running.items() if not task.done()]
        if left:
            log.warning("attempt.calls_left_behind", job_id=self.task.job_id, calls=left)
        return left

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
                    on_progress=lambda done, total, text: self._log.progress(call, done, total, text),
                    begin=self._begin,
                    before_send=lambda: self._before_send(call),
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

    async def _withdraw_unsent(self) -> None:
        """A call that was stopped between its mark and its sending may run: the next attempt must not take it for one
        whose outcome is not known."""
        for call in self.task.tools:
            if self._stop is not Stop.LOST and call.tool_call_id in self._marked - self._sent:
                await self._withdraw(call)

    async def _withdraw(self, call: ToolCall) -> None:
        self._sent.discard(call.tool_call_id)
        self._marked.discard(call.tool_call_id)
        await self._gate.insist(lambda: self._store.withdraw_mark(self.lease, call.tool_call_id))

    def _end(self, call: ToolCall, outcome: CallOutcome, duration_ms: int) -> None:
        self._ends[call.tool_call_id] = outcome.end
        if outcome.error is not None:
            self._errors[call.tool_call_id] = outcome.error
        last = len(self._ends) == len(self.task.tools)
        self._log.ended(call, outcome, duration_ms, flush=not last)

    def _conclude(self, still_running: list[str]) -> Outcome:
        ends = dict(self._ends)
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
            reached="tool" if self._sent - self._ends.keys() else "worker",
            still_running=still_running,
            timeout_s=self.task.timeout_ms / 1000,
        )
