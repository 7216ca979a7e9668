"""The last words of an attempt that are written once more, or late, when a person has already spoken (G2, G3)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.background_jobs.making import ERROR, LEASE_MS, ending, make_task, result, told
from toolfleet.services.background_jobs import transitions
from toolfleet.services.background_jobs.last_words import (
    FinishWrite,
    HandBackWrite,
    LastWords,
    LastWrite,
    ProgressWrite,
    RetryWrite,
)
from toolfleet.services.background_jobs.ports import Changes, Granted, Lease
from toolfleet.services.background_jobs.redis_state_manager import RedisStateManager
from toolfleet.services.background_jobs.task_models import Status, TaskDefinition

LATE: list[LastWrite] = [
    *(FinishWrite(ending(status), told("c1")) for status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)),
    FinishWrite(ending(Status.UNKNOWN, "job_x"), Changes()),
    RetryWrite(0, ERROR, told("c1")),
    HandBackWrite(told("c1")),
    ProgressWrite(9, told("c1")),
]

Story = Callable[[RedisStateManager, TaskDefinition, Lease], Awaitable[object]]


async def claim(store: RedisStateManager, task: TaskDefinition, token: str) -> Lease:
    answer = await store.claim(task, token=token, worker="w", lease_ms=LEASE_MS, published_at=None)
    assert isinstance(answer, Granted)
    return Lease(task.job_id, answer.fence)


async def claimed_again(store: RedisStateManager, task: TaskDefinition) -> None:
    await claim(store, task.model_copy(update={"generation": 2}), "second")


async def reopened(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    """The fence stays what it was until somebody claims the new generation."""
    await store.finish(lease, transitions.failed(ERROR), Changes())
    assert (await store.reopen(task.job_id, "retry")).generation == 2


async def reopened_and_cancelled(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await reopened(store, task, lease)
    await store.cancel(task.job_id, "not after all")


async def reopened_and_claimed(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await reopened(store, task, lease)
    await claimed_again(store, task)


async def redriven(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await store.finish(lease, transitions.failed(ERROR), Changes())
    assert (await store.redrive(task, lease.fence, LEASE_MS, "", "")).generation == 2


async def became_unknown(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await store.mark_start(lease, task.tools[0], LEASE_MS)
    await store.finish(lease, transitions.unknown(task.job_id, ["c1"]), Changes())


async def decided_to_run_again(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await became_unknown(store, task, lease)
    assert (await store.resolve(task.job_id, "c1", "rerun", None, "")).generation == 2


async def decided_and_claimed(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await decided_to_run_again(store, task, lease)
    await claimed_again(store, task)


async def decided_to_be_done(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await became_unknown(store, task, lease)
    assert (await store.resolve(task.job_id, "c1", "completed", result("c1", text="decided"), "")).verdict == "closed"


async def retried_and_cancelled(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await store.retry(lease, 0, ERROR, Changes())
    await store.cancel(task.job_id, "enough")


async def retried_cancelled_and_reopened(store: RedisStateManager, task: TaskDefinition, lease: Lease) -> None:
    await retried_and_cancelled(store, task, lease)
    assert (await store.reopen(task.job_id, "retry")).generation == 2


STORIES: list[Story] = [
    reopened,
    reopened_and_cancelled,
    reopened_and_claimed,
    redriven,
    decided_to_run_again,
    decided_and_claimed,
    decided_to_be_done,
    retried_and_cancelled,
    retried_cancelled_and_reopened,
]


@pytest.mark.promise("G2")
@pytest.mark.promise("G3")
@pytest.mark.leaves_open_jobs
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
async def test_late_words_change_nothing_that_a_person_has_said(store: RedisStateManager, story: Story) -> None:
    for late in LATE:
        for unanswered in (None, ProgressWrite(1, told("c1"))):
            task = make_task()
            lease = await claim(store, task, "first")
            await story(store, task, lease)

            async def everything(job_id: str = task.job_id) -> tuple[object, ...]:
                return await store.get(job_id), await store.events(job_id), await store.results(job_id)

            before = await everything()
            await LastWords(lease, late, unanswered, withdrawn=("c1",)).write(store)
            assert await everything() == before, late
