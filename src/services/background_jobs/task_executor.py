"""One job, from a delivery to its ack: read, claim, run, write, settle."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import structlog

from toolfleet.services.background_jobs import transitions
from toolfleet.services.background_jobs.attempt import Attempt, AttemptRules
from toolfleet.services.background_jobs.errors import (
    MalformedTask,
    NewerTask,
    QueueError,
    StoreError,
    StoreUnavailable,
)
from toolfleet.services.background_jobs.finish_spool import FinishSpool
from toolfleet.services.background_jobs.last_words import FinishWrite, HandBackWrite, LastWrite, RetryWrite
from toolfleet.services.background_jobs.ports import Changes, ClaimAnswer, Granted, JobStore, NotNow, Over, ToolRunner
from toolfleet.services.background_jobs.queue_ports import DeadLetter, DeadLetterBox, Delivery, JobQueue
from toolfleet.services.background_jobs.retry_policy import spread_ms
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_lease import LeaseKeeper
from toolfleet.services.background_jobs.task_models import ErrorInfo, TaskDefinition, is_job_id
from toolfleet.services.background_jobs.transitions import (
    Cancelled,
    Completed,
    Ending,
    Failed,
    HandedBack,
    Lost,
    Outcome,
    Retry,
    Unknown,
)

log = structlog.get_logger(__name__)

NEWER_TASK_DELAY_S = 30.0
"""For a task of a newer version: time for a newer worker to come up during a rolling upgrade."""
CONFLICT = "idempotency_conflict"
CONFLICT_TEXT = (
    "while Redis could not be asked, this job was accepted under the Idempotency-Key of another one; it was not run. "
    "Submit it again with a key of its own"
)
REFUSED_DELAY_S = 5.0
"""After the store has refused a claim, which a person has to look at."""


class JobExecutor:
    """Executes jobs for one process: a worker's, or an API's synchronous ones."""

    def __init__(
        self,
        *,
        store: JobStore,
        queue: JobQueue,
        letters: DeadLetterBox,
        runner: ToolRunner,
        keeper: LeaseKeeper,
        gate: StoreGate,
        spool: FinishSpool,
        rules: AttemptRules,
        worker_id: str,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._queue = queue
        self._letters = letters
        self._runner = runner
        self._keeper = keeper
        self._gate = gate
        self._spool = spool
        self._rules = rules
        self.worker_id = worker_id
        self._chance = chance
        self._clock = clock
        self._attempts: set[Attempt] = set()
        self.ended: dict[str, int] = {}

    @property
    def attempts(self) -> frozenset[Attempt]:
        """Those that run now."""
        return frozenset(self._attempts)

    async def execute(self, delivery: Delivery) -> None:
        """Take one delivery to its end."""
        with self._keeper.delivery(delivery):
            task = await self._read(delivery)
            if task is None:
                return
            asked_at, answer = await self._claim(task, delivery)
            match answer:
                case Granted():
                    await self._attempt(task, answer, asked_at, delivery)
                case Over(reason="conflict"):
                    # It was accepted, so it must not go without a word.
                    if await self._bury(
                        DeadLetter(task.job_id, 0, CONFLICT, CONFLICT_TEXT, delivery.data, delivery.subject)
                    ):
                        await delivery.ack()
                case Over():
                    await delivery.ack()
                case NotNow(delay_ms=delay_ms):
                    await delivery.nak(spread_ms(delay_ms, self._chance()) / 1000)

    async def run_now(self, task: TaskDefinition) -> ClaimAnswer:
        """A synchronous run: claims first, holds lease and fence, ends like any other attempt."""
        asked_at, answer = await self._claim(task, None)
        if isinstance(answer, Granted):
            await self._attempt(task, answer, asked_at, None)
        return answer

    async def _read(self, delivery: Delivery) -> TaskDefinition | None:
        last = delivery.subject.rpartition(".")[2]
        try:
            task = TaskDefinition.from_json(delivery.data)
            if task.job_id != last:
                # Cancel, reopen and the reconciler find a job's message by its subject.
                raise MalformedTask(f"not a task: its job_id is {task.job_id}, its subject {delivery.subject}")
            return task
        except NewerTask as error:
            log.warning("task.newer", subject=delivery.subject, error=str(error), hint="a newer worker will take it")
            await delivery.nak(NEWER_TASK_DELAY_S * (1 + self._chance()))
        except MalformedTask as error:
            job_id = last if is_job_id(last) else None
            letter = DeadLetter(job_id, 0, "malformed", str(error), delivery.data, subject=delivery.subject)
            if await self._bury(letter):
                await delivery.ack()
        return None

    async def _bury(self, letter: DeadLetter) -> bool:
        """Publish a dead letter; whether it is stored. Where it is not, the redelivery tries again."""
        try:
            await self._letters.store(letter)
        except QueueError as error:
            log.error("dead_letter.not_stored", job_id=letter.job_id, error=str(error))
            return False
        log.warning("dead_letter.stored", job_id=letter.job_id, reason=letter.reason)
        return True

    async def _claim(self, task: TaskDefinition, delivery: Delivery | None) -> tuple[float, ClaimAnswer]:
        """Step 3; with the store down it waits for a while, and the keeper keeps the message."""
        # A token per pull, not per worker: a restarted worker must not be taken for its own dead attempt.
        token = f"{random.getrandbits(64):016x}"
        asked_at = self._clock()

        async def claim() -> ClaimAnswer:
            nonlocal asked_at
            asked_at = self._clock()
            return await self._store.claim(
                task,
                token=token,
                worker=self.worker_id,
                lease_ms=self._keeper.lease_ms,
                published_at=delivery.published_at if delivery else None,
            )

        try:
            answer = await (self._claim_patiently(task, claim) if delivery else claim())
        except StoreError as error:
            if delivery is None:
                raise
            log.error("claim.refused", job_id=task.job_id, error=str(error))
            answer = NotNow(int(REFUSED_DELAY_S * 1000), str(error))
        return asked_at, answer

    async def _claim_patiently(self, task: TaskDefinition, claim: Callable[[], Awaitable[ClaimAnswer]]) -> ClaimAnswer:
        """Wait for a store that is down, but no longer than for a lease: it may be down for this worker alone, and by
        then a claim whose answer was lost keeps nobody else from the job."""
        try:
            return await claim()
        except StoreUnavailable as error:
            self._gate.shut(error)
            reason = str(error)
        try:
            async with asyncio.timeout(self._keeper.lease_s):
                await self._gate.wait()
                return await self._gate.insist(claim)
        except TimeoutError:
            log.warning("claim.given_back", job_id=task.job_id, error=reason, hint="another worker may reach Redis")
            return NotNow(0, reason)

    async def _attempt(
        self, task: TaskDefinition, granted: Granted, asked_at: float, delivery: Delivery | None
    ) -> None:
        attempt = Attempt(
            task,
            granted,
            store=self._store,
            gate=self._gate,
            runner=self._runner,
            rules=self._rules,
            clock=self._clock,
        )
        self._attempts.add(attempt)
        try:
            with self._keeper.attempt(attempt, asked_at) as held:
                if granted.dead is not None:
                    outcome, changes = await self._dead(task, granted, granted.dead)
                else:
                    outcome, changes = await attempt.run(held)
                await self._settle(attempt, outcome, changes, delivery)
        finally:
            self._attempts.discard(attempt)

    async def _queue_again(self, task: TaskDefinition) -> None:
        """What a synchronous run leaves to others has no message yet; step 3 hands it back until it is due."""
        try:
            await self._queue.publish(task, again=True)
        except QueueError as error:
            log.warning("sync.publish_deferred", job_id=task.job_id, error=str(error), hint="the reconciler will do it")

    async def _dead(self, task: TaskDefinition, granted: Granted, error: ErrorInfo) -> tuple[Outcome, Changes]:
        """Step 9: the dead letter is stored before the job ends."""
        letter = DeadLetter(task.job_id, granted.fence, error.code, error.message, task.to_json())
        return (Failed(error) if await self._bury(letter) else Lost()), Changes()

    async def _settle(self, attempt: Attempt, outcome: Outcome, changes: Changes, delivery: Delivery | None) -> None:
        """Write the outcome, and only then tell the queue. A refused write neither acks nor naks (step 7)."""
        name = type(outcome).__name__.lower()
        self.ended[name] = self.ended.get(name, 0) + 1
        lease, delay_ms = attempt.lease, 0
        match outcome:
            case Lost():
                log.warning("attempt.lost", job_id=lease.job_id, fence=lease.fence)
                if (left := attempt.results_left(changes)) is None:
                    return
                # A lease that ran out while the store was away: unless somebody has taken the job, these calls need
                # not run again, and the others may at once.
                self._keeper.give_up(attempt)
                last: LastWrite = left
            case Retry(error=error):
                delay_ms = self._rules.retries.delay_ms(attempt.retries, self._chance())
                last = RetryWrite(delay_ms, error, changes)
            case HandedBack():
                last = HandBackWrite(changes)
            case _:
                last = FinishWrite(_ending(attempt.task, outcome), changes)
        answer = await self._spool.insist(attempt.last_words(last))
        if answer == "lost":
            log.warning("attempt.write_refused", job_id=lease.job_id, fence=lease.fence, outcome=name)
        elif isinstance(last, FinishWrite) or answer == "cancelled":
            # The job is over, also where a cancel has ended it instead of a retry: it needs no message.
            if delivery is not None:
                await delivery.ack()
        elif delivery is None:
            await self._queue_again(attempt.task)
        else:
            await delivery.nak(spread_ms(delay_ms, self._chance()) / 1000 if delay_ms else 0)


def _ending(task: TaskDefinition, outcome: Outcome) -> Ending:
    match outcome:
        case Completed():
            return transitions.completed(len(task.tools))
        case Failed(error=error):
            return transitions.failed(error)
        case Cancelled():
            return transitions.cancelled(outcome)
        case Unknown(calls=calls):
            return transitions.unknown(task.job_id, calls)
        case _:
            raise TypeError(f"{type(outcome).__name__} does not end a job")
