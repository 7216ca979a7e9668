"""Builds that break one rule each, to show that the driver's audit would see it (tests/chaos/test_broken_builds.py)."""

from __future__ import annotations

from typing import Final

from tests.chaos.weaving import Patch

_JOBS = "services.background_jobs"

BROKEN: Final[dict[str, tuple[Patch, ...]]] = {
    # Step 7: whoever dies between the two leaves a job that no message wakes. An ack is not waited for; the question
    # behind it on the same connection sees to it that it has left the process.
    "ack-before-finish": (
        Patch(
            f"{_JOBS}.task_executor",
            "JobExecutor._settle",
            "_ending(attempt.task, outcome)",
            "(delivery and (await delivery.ack(), await self._queue.stands(lease.job_id)), "
            "_ending(attempt.task, outcome))[1]",
        ),
    ),
    # G2: an attempt that slept past its lease writes into the one that has followed it.
    "no-fence": (Patch("30_attempt.lua", "", "not rec or rec.fence ~= tonumber(fence) or", "not rec or"),),
    # Step 1: a record without a message is a job that was refused, and that step 12 runs all the same.
    "enqueue-before-publish-ack": (
        Patch(
            f"{_JOBS}.submission",
            "Submitter.submit",
            "await self._queue.publish(task)",
            "(await self._store.enqueue(task), await self._queue.publish(task))[1]",
        ),
    ),
    # Step 4: a worker that dies after the call and before the mark leaves no trace of the call.
    "start-mark-not-awaited": (
        Patch(
            f"{_JOBS}.attempt",
            "Attempt._begin",
            "await self._gate.insist(",
            "(lambda mark: ('ok', asyncio.create_task(self._gate.insist(mark)))[0])(",
        ),
    ),
    # Step 11: within the duplicate window the stream swallows the new message.
    "reopen-with-old-message-id": (
        Patch(f"{_JOBS}.nats_task_queue", "NatsTaskQueue.publish", "task.task_id", "f'{task.job_id}:1'"),
    ),
    # Step 1: a full stream is taken for one that has stored the job.
    "10077-is-success": (Patch(f"{_JOBS}.nats_streams", "StreamAdmin.publish", "return 'refused'", "return 'stored'"),),
    # Step 9: the letter of a job that dies again after its redrive is swallowed as a duplicate of the first one.
    "dead-letter-without-fence": (
        Patch(
            f"{_JOBS}.nats_dead_letters",
            "NatsDeadLetters.store",
            "f'dlq:{letter.job_id}:{letter.fence}'",
            "f'dlq:{letter.job_id}'",
        ),
    ),
    # Step 1: nobody else can know that the job runs already.
    "sync-run-without-claim": (
        Patch(
            f"{_JOBS}.submission",
            "Submitter._run_now",
            "reason is not None and never_published and",
            "True or",
        ),
    ),
}
"""By name, what each changes."""

SHORT_GRACE: Final = (Patch("10_common.lua", "", "local GRACE_MS = 10000", "local GRACE_MS = 500"),)
"""Not broken: the reconciler looks at a job half a second after its time and not ten, so that a test need not wait."""
