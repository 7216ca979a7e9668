"""What the store does with single jobs: the cases that need a story to be understood."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis import Redis

from tests.background_jobs.dumping import check_job, log_of, record_of, results_of
from tests.background_jobs.making import ERROR, LEASE_MS, ending, make_task, result, told
from tests.support.waiting import wait_until
from toolfleet.bootstrap import redis_client
from toolfleet.services.background_jobs.errors import InvalidCursor
from toolfleet.services.background_jobs.ports import Changes, ClaimAnswer, Granted, Lease, NotNow, Over, WorkerInfo
from toolfleet.services.background_jobs.redis_records import partition_of, root_of
from toolfleet.services.background_jobs.redis_state_manager import RedisStateManager
from toolfleet.services.background_jobs.task_models import EventType, Status, TaskDefinition, Tier
from toolfleet.settings import Settings

A_DAY_MS = 86_400_000


async def claim(store: RedisStateManager, task: TaskDefinition, token: str = "t1", **more: Any) -> ClaimAnswer:
    values: dict[str, Any] = {"worker": "w1", "lease_ms": LEASE_MS, "published_at": None}
    return await store.claim(task, token=token, **(values | more))


async def granted(store: RedisStateManager, task: TaskDefinition, token: str = "t1") -> tuple[Granted, Lease]:
    answer = await claim(store, task, token)
    assert isinstance(answer, Granted), answer
    return answer, Lease(task.job_id, answer.fence)


def set_field(redis: Redis, job: TaskDefinition, /, **fields: Any) -> None:
    """Lets time pass, or a fault happen, in a record."""
    redis.hset(f"{root_of(job.job_id)}:job:{job.job_id}", mapping=fields)


def status_of(redis: Redis, task: TaskDefinition) -> str:
    check_job(redis, task.job_id)
    return record_of(redis, task.job_id)["status"]


async def end(store: RedisStateManager, task: TaskDefinition, lease: Lease, status: Status) -> None:
    assert await store.finish(lease, ending(status, task.job_id), Changes()) == "ok"


# -- claims ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("G1")
async def test_a_claim_makes_the_record_that_a_submit_could_not_write(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    _, lease = await granted(store, task)
    assert [event.type for event in log_of(redis, task.job_id)] == [EventType.JOB_QUEUED, EventType.JOB_STARTED]
    record, new = await store.enqueue(task)
    assert (record.status, new) == (Status.RUNNING, False)
    await end(store, task, lease, Status.COMPLETED)


async def test_a_repeated_claim_has_its_whole_lease(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    first, lease = await granted(store, task)
    set_field(redis, task, lease_until=1)
    assert await claim(store, task) == first
    assert isinstance(await claim(store, task, "other"), NotNow)
    await end(store, task, lease, Status.COMPLETED)


async def test_a_restarted_worker_is_not_taken_for_its_own_dead_attempt(store: RedisStateManager) -> None:
    task = make_task()
    _, lease = await granted(store, task, "before")
    answer = await claim(store, task, "after", worker="w1")
    assert isinstance(answer, NotNow)
    assert 0 < answer.delay_ms <= LEASE_MS
    await end(store, task, lease, Status.COMPLETED)


async def test_a_message_of_an_older_generation_is_over(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    _, lease = await granted(store, task)
    await end(store, task, lease, Status.FAILED)
    reopened = (await store.reopen(task.job_id, "again")).task
    assert reopened is not None
    assert await claim(store, task, "late") == Over("superseded")
    answer, lease = await granted(store, reopened, "new")
    assert answer.generation == 2
    await end(store, reopened, lease, Status.COMPLETED)
    assert status_of(redis, task) == "completed"


@pytest.mark.promise("G1")
async def test_a_message_of_a_newer_generation_tells_what_redis_has_lost(
    store: RedisStateManager, redis: Redis
) -> None:
    task = make_task(2, run_at=1)
    _, lease = await granted(store, task)
    await store.progress(lease, told("c1"), 1)
    await store.progress(lease, told("c2", status="failed"), 2)
    await end(store, task, lease, Status.FAILED)
    newer = task.model_copy(update={"generation": 2})
    answer, lease = await granted(store, newer, "t2")
    assert dict(answer.done) == {"c1": "completed"}
    assert status_of(redis, task) == "running"
    assert (await store.finish(lease, ending(Status.COMPLETED), told("c2"))) == "ok"
    assert status_of(redis, task) == "completed"


async def test_a_newer_generation_takes_a_job_from_whoever_holds_it(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    _, old = await granted(store, task)
    assert (await store.cancel(task.job_id, "x")).found == "running"
    answer, lease = await granted(store, task.model_copy(update={"generation": 2}), "t2")
    assert answer.dead is None
    assert await store.renew([old, lease], LEASE_MS) == ["lost", "held"]
    await end(store, task, lease, Status.COMPLETED)
    assert status_of(redis, task) == "completed"


@pytest.mark.promise("G9")
async def test_starts_that_end_without_a_word_are_counted_and_retries_are_not(
    store: RedisStateManager, redis: Redis
) -> None:
    task = make_task()
    for number in range(2):
        _, lease = await granted(store, task, f"retry{number}")
        assert await store.retry(lease, 0, ERROR, Changes()) == "ok"
    for number in range(3):
        answer, lease = await granted(store, task, f"dies{number}")
        assert answer.dead is None
        set_field(redis, task, lease_until=1)
    answer, lease = await granted(store, task, "last")
    assert answer.dead is not None
    assert answer.dead.code == "too_many_starts"
    await end(store, task, lease, Status.FAILED)


async def test_a_message_older_than_results_are_kept_is_a_dead_letter_and_can_be_redriven(
    store: RedisStateManager, redis: Redis
) -> None:
    task = make_task()
    answer = await claim(store, task, published_at=1)
    assert isinstance(answer, Granted)
    assert answer.dead is not None
    assert answer.dead.code == "stale"
    await end(store, task, Lease(task.job_id, answer.fence), Status.FAILED)
    redriven = (await store.reopen(task.job_id, "redrive")).task
    assert redriven is not None
    answer, lease = await granted(store, redriven, "t2")
    assert answer.dead is None
    await end(store, redriven, lease, Status.COMPLETED)


# -- time ------------------------------------------------------------------------------------------------------------


async def test_a_job_is_not_due_before_its_delay(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(delay_ms=60_000)
    await store.enqueue(task)
    answer = await claim(store, task)
    assert isinstance(answer, NotNow)
    assert 50_000 < answer.delay_ms <= 60_000
    set_field(redis, task, not_before=1)
    _, lease = await granted(store, task)
    await end(store, task, lease, Status.COMPLETED)


async def test_a_job_that_was_not_started_in_time_expires(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(expires_at=1)
    await store.enqueue(task)
    assert await claim(store, task) == Over("failed")
    record = await store.get(task.job_id)
    assert record is not None
    assert record.error is not None
    assert record.error.code == "expired"
    # A person may still want it.
    again = (await store.reopen(task.job_id, "again")).task
    assert again is not None
    assert again.expires_at is None
    _, lease = await granted(store, again)
    await end(store, again, lease, Status.COMPLETED)


async def test_a_job_that_was_handed_back_was_started_and_does_not_expire(
    store: RedisStateManager, redis: Redis
) -> None:
    task = make_task()
    _, lease = await granted(store, task)
    assert await store.hand_back(lease, Changes()) == "ok"
    set_field(redis, task, expires=1)
    answer, lease = await granted(store, task, "t2")
    assert answer.dead is None
    await end(store, task, lease, Status.COMPLETED)


async def test_running_time_is_added_up_over_attempts_and_waiting_is_not(
    store: RedisStateManager, redis: Redis
) -> None:
    task = make_task(timeout_ms=100_000)
    _, lease = await granted(store, task)
    now = int(record_of(redis, task.job_id)["run_from"])
    set_field(redis, task, run_from=now - 30_000)
    await store.retry(lease, 0, ERROR, Changes())
    answer, lease = await granted(store, task, "t2")
    assert 69_000 < answer.remaining_ms <= 70_000
    # This attempt dies: it is counted to the end of its lease.
    set_field(redis, task, run_from=now - 50_000, lease_until=now - 10_000)
    answer, lease = await granted(store, task, "t3")
    assert 29_000 < answer.remaining_ms <= 30_000
    await end(store, task, lease, Status.COMPLETED)


@pytest.mark.parametrize("marked", [False, True])
async def test_a_job_whose_time_a_dead_attempt_used_up_ends_at_the_next_claim(
    store: RedisStateManager, redis: Redis, marked: bool
) -> None:
    task = make_task(2, timeout_ms=10_000)
    _, lease = await granted(store, task)
    if marked:
        await store.mark_start(lease, task.tools[0], LEASE_MS)
    set_field(redis, task, run_from=1, lease_until=20_000)
    assert await claim(store, task, "t2") == Over("unknown" if marked else "failed")
    record = await store.get(task.job_id)
    assert record is not None
    assert record.undecided == (("c1",) if marked else ())
    assert record.error is not None
    assert record.error.code == ("outcome_unknown" if marked else "timeout")
    check_job(redis, task.job_id)


# -- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.promise("G5")
async def test_a_failed_call_that_must_not_run_twice_runs_again_on_a_persons_word(
    store: RedisStateManager, redis: Redis
) -> None:
    task = make_task(2)
    _, lease = await granted(store, task)
    for call in task.tools:
        assert await store.mark_start(lease, call, LEASE_MS) == "ok"
    await store.progress(lease, told("c1"), 1)
    assert await store.finish(lease, ending(Status.FAILED), told("c2", status="failed")) == "ok"
    again = (await store.reopen(task.job_id, "again")).task
    assert again is not None
    answer, lease = await granted(store, again, "t2")
    assert (dict(answer.done), answer.marked) == ({"c1": "completed"}, frozenset())
    await end(store, again, lease, Status.COMPLETED)
    check_job(redis, task.job_id)


async def unknown_job(store: RedisStateManager, redis: Redis, calls: int = 1) -> tuple[TaskDefinition, Lease]:
    """A job whose only attempt has started every call and died."""
    task = make_task(calls)
    _, lease = await granted(store, task)
    for call in task.tools:
        assert await store.mark_start(lease, call, LEASE_MS) == "ok"
    set_field(redis, task, lease_until=1)
    assert await claim(store, task, "t2") == Over("unknown")
    return task, lease


async def test_the_attempt_that_made_a_job_unknown_may_tell_the_truth(store: RedisStateManager, redis: Redis) -> None:
    task, lease = await unknown_job(store, redis, 2)
    assert await store.finish(lease, ending(Status.COMPLETED), told("c1", "c2")) == "ok"
    record = await store.get(task.job_id)
    assert record is not None
    assert (record.status, record.generation, record.undecided) == (Status.COMPLETED, 2, ())
    ends = [(event.type, event.generation) for event in log_of(redis, task.job_id) if event.ends_stream]
    assert ends == [(EventType.JOB_UNKNOWN, 1), (EventType.JOB_COMPLETED, 2)]
    check_job(redis, task.job_id)


async def test_a_decision_comes_before_the_truth(store: RedisStateManager, redis: Redis) -> None:
    task, lease = await unknown_job(store, redis, 2)
    answer = await store.resolve(task.job_id, "c1", "failed", result("c1", "failed"), "it did not arrive")
    assert answer.verdict == "waiting"
    assert await store.finish(lease, ending(Status.COMPLETED), told("c1", "c2")) == "lost"
    assert set(results_of(redis, task.job_id)) == {"c1"}
    assert status_of(redis, task) == "unknown"


@pytest.mark.parametrize(
    ("decisions", "verdict", "status"),
    [
        (["completed", "completed"], "closed", "completed"),
        (["completed", "failed"], "closed", "failed"),
        (["rerun", "completed"], "reopened", "queued"),
        (["rerun", "rerun"], "reopened", "queued"),
    ],
)
@pytest.mark.leaves_open_jobs
async def test_the_last_of_two_decisions_opens_the_new_generation(
    store: RedisStateManager, redis: Redis, decisions: list[Any], verdict: str, status: str
) -> None:
    task, _ = await unknown_job(store, redis, 2)
    for call, decision, expected in zip(("c2", "c1"), decisions, ("waiting", verdict), strict=True):
        decided = None if decision == "rerun" else result(call, decision)
        answer = await store.resolve(task.job_id, call, decision, decided, "")
        assert answer.verdict == expected
    assert status_of(redis, task) == status
    record = await store.get(task.job_id)
    assert record is not None
    assert (record.generation, record.undecided) == (2, ())
    if verdict == "reopened":
        assert answer.task is not None
        reply, _ = await granted(store, answer.task, "t3")
        assert (set(reply.done), reply.marked) == ({"c1"} if decisions[1] == "completed" else set(), frozenset())


@pytest.mark.promise("G8")
async def test_a_cancel_wins_over_handing_back_and_retrying(store: RedisStateManager, redis: Redis) -> None:
    for leave in ("retry", "hand_back"):
        task = make_task()
        _, lease = await granted(store, task)
        assert (await store.cancel(task.job_id, "x")).found == "running"
        for _ in range(2):
            if leave == "retry":
                assert await store.retry(lease, 0, ERROR, told("c1")) == "cancelled"
            else:
                assert await store.hand_back(lease, told("c1")) == "cancelled"
        assert status_of(redis, task) == "cancelled"
        assert set(results_of(redis, task.job_id)) == {"c1"}


@pytest.mark.promise("G3")
async def test_of_a_cancel_and_a_finish_one_comes_first(store: RedisStateManager, redis: Redis) -> None:
    for number in range(20):
        task = make_task()
        _, lease = await granted(store, task)
        finish = store.finish(lease, ending(Status.COMPLETED), told("c1"))
        cancel = store.cancel(task.job_id, "x")
        if number % 2:
            written, answer = await asyncio.gather(finish, cancel)
        else:
            answer, written = await asyncio.gather(cancel, finish)
        assert written == "ok"
        assert answer.found in ("running", "ended")
        assert status_of(redis, task) == "completed"


async def test_a_cancel_tells_its_worker_and_notes_itself_once(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    _, lease = await granted(store, task)
    with redis.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe("tf:ctl:w1")
        channel.get_message(timeout=5)
        for _ in range(2):
            answer = await store.cancel(task.job_id, "x")
            assert (answer.found, answer.worker) == ("running", "w1")
            message = channel.get_message(timeout=5)
            assert message is not None
            assert message["data"] == f"cancel {task.job_id}"
    assert await store.renew([lease], LEASE_MS) == ["cancel"]
    kinds = [event.type for event in log_of(redis, task.job_id)]
    assert kinds.count(EventType.JOB_CANCELLING) == 1
    await end(store, task, lease, Status.CANCELLED)


async def test_a_job_without_a_record_is_cancelled_by_its_message(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    assert (await store.cancel(task.job_id, "x")).found == "absent"
    assert (await store.cancel(task.job_id, "x", task)).found == "cancelled_now"
    assert await claim(store, task) == Over("cancelled")
    assert status_of(redis, task) == "cancelled"


# -- the reconciler's view -------------------------------------------------------------------------------------------


STUCK_MS = 300_000


def make_due(redis: Redis, task: TaskDefinition) -> None:
    redis.zadd(f"{root_of(task.job_id)}:due", {task.job_id: 1})


async def orphans(store: RedisStateManager, task: TaskDefinition) -> list[Any]:
    return list(await store.orphans(partition_of(task.job_id), 100, STUCK_MS))


@pytest.mark.leaves_open_jobs
async def test_an_orphan_is_handed_out_once(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    await store.enqueue(task)
    assert await orphans(store, task) == [], "a job is left to its message for a while"
    make_due(redis, task)
    found = await asyncio.gather(*(orphans(store, task) for _ in range(5)))
    assert sum(len(each) for each in found) == 1
    check_job(redis, task.job_id)


@pytest.mark.leaves_open_jobs
async def test_a_job_that_is_held_or_not_due_is_no_orphan(store: RedisStateManager, redis: Redis) -> None:
    running, waiting = make_task(), make_task(delay_ms=60_000)
    await granted(store, running)
    await store.enqueue(waiting)
    for task in (running, waiting):
        make_due(redis, task)
        assert await orphans(store, task) == []
        due = redis.zscore(f"{root_of(task.job_id)}:due", task.job_id)
        assert due is not None
        assert due > 1


@pytest.mark.leaves_open_jobs
async def test_an_orphan_that_somebody_took_in_the_meantime_is_left_alone(
    store: RedisStateManager, redis: Redis
) -> None:
    task = make_task()
    await store.enqueue(task)
    make_due(redis, task)
    (orphan,) = await orphans(store, task)
    await granted(store, task)
    assert await store.reclaim(orphan) == "changed"


@pytest.mark.leaves_open_jobs
async def test_a_write_after_the_job_was_reclaimed_is_refused(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    _, lease = await granted(store, task)
    set_field(redis, task, lease_until=1)
    make_due(redis, task)
    (orphan,) = await orphans(store, task)
    assert await store.reclaim(orphan) == "publish"
    assert status_of(redis, task) == "queued"
    assert await store.retry(lease, 0, ERROR, told("c1")) == "lost"
    assert await store.hand_back(lease, told("c1")) == "lost"
    assert await store.finish(lease, ending(Status.COMPLETED), told("c1")) == "lost"
    assert results_of(redis, task.job_id) == {}


@pytest.mark.leaves_open_jobs
async def test_a_record_of_a_newer_version_is_left_to_a_newer_worker(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    await store.enqueue(task)
    set_field(redis, task, task='{"v": 2}')
    make_due(redis, task)
    assert await orphans(store, task) == []
    assert status_of(redis, task) == "queued"


async def test_a_record_without_a_task_is_lost(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    await store.enqueue(task)
    redis.hdel(f"{root_of(task.job_id)}:job:{task.job_id}", "task")
    make_due(redis, task)
    (orphan,) = await orphans(store, task)
    assert await store.reclaim(orphan) == "settled"
    assert status_of(redis, task) == "failed"
    assert '"lost"' in record_of(redis, task.job_id)["error"]


async def test_what_has_expired_leaves_the_indexes(settings: Settings, redis_url: str, redis: Redis) -> None:
    async with redis_client(settings, redis_url) as client:
        store = RedisStateManager(client, timeout_s=5, log_max=1000, result_ttl_s=0.05, max_starts=3)
        task = make_task()
        _, lease = await granted(store, task)
        await end(store, task, lease, Status.COMPLETED)
        await wait_until(lambda: not record_of(redis, task.job_id), "the record has expired")

        async def pruned() -> int:
            return await store.prune(partition_of(task.job_id), 100)

        assert await wait_until(pruned, "the job is pruned") == 1
        check_job(redis, task.job_id)
        assert await store.get(task.job_id) is None


# -- reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.leaves_open_jobs
async def test_pages_hold_every_job_once_newest_first(store: RedisStateManager) -> None:
    tasks = [make_task(priority=tier) for tier in (*Tier, *Tier, *Tier)]
    other = make_task(tenant="other")
    for task in (*tasks, other):
        await store.enqueue(task)
    seen, cursor = [], None
    while True:
        page = await store.jobs("default", None, None, cursor, 2)
        seen += page.jobs
        cursor = page.cursor
        if cursor is None:
            break
    assert sorted(job.job_id for job in seen) == sorted(task.job_id for task in tasks)
    assert [(job.created_at, job.job_id) for job in seen] == sorted(
        ((job.created_at, job.job_id) for job in seen), reverse=True
    )
    low = await store.jobs("default", Status.QUEUED, Tier.LOW, None, 100)
    assert {job.task.priority for job in low.jobs} == {Tier.LOW}
    assert len(low.jobs) == 3
    assert not (await store.jobs("default", Status.RUNNING, None, None, 100)).jobs
    with pytest.raises(InvalidCursor):
        await store.jobs("default", None, None, "nonsense", 2)


@pytest.mark.leaves_open_jobs
async def test_figures_tell_what_waits_what_runs_and_what_ended(store: RedisStateManager) -> None:
    waiting, running, done = make_task(priority=Tier.HIGH), make_task(priority=Tier.LOW), make_task()
    await store.enqueue(waiting)
    await granted(store, running)
    _, lease = await granted(store, done)
    await end(store, done, lease, Status.COMPLETED)
    stats = await store.stats()
    assert (stats.tiers[Tier.HIGH].queued, stats.tiers[Tier.LOW].running) == (1, 1)
    assert (stats.totals[Status.COMPLETED], stats.totals[Status.QUEUED], stats.totals[Status.RUNNING]) == (1, 1, 1)
    assert (stats.finished_last_minute, stats.finished_last_15_minutes) == (1, 1)


async def test_a_log_is_read_in_pages_also_in_the_middle_of_a_write(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(3)
    _, lease = await granted(store, task)
    assert await store.finish(lease, ending(Status.COMPLETED), told("c1", "c2", "c3")) == "ok"
    everything = log_of(redis, task.job_id)
    for after in range(len(everything) + 1):
        assert list(await store.events(task.job_id, after)) == everything[after:]


async def test_a_worker_is_shown_until_its_heartbeat_runs_out(store: RedisStateManager, redis: Redis) -> None:
    info = WorkerInfo("w1", Tier.HIGH, "host", 1, 0, 0, 20, 3, 7, "0.1", "running")
    await store.heartbeat(info, 60)
    (shown,) = await store.workers()
    assert (shown.worker_id, shown.tier, shown.in_flight) == ("w1", Tier.HIGH, 3)
    assert shown.seen_at > 0
    await store.heartbeat(info, 0.001)

    async def gone() -> bool:
        return not await store.workers()

    await wait_until(gone, "the heartbeat has run out")
    assert redis.hlen("tf:{workers}:beats") == 0


async def test_many_that_make_one_record_make_one(store: RedisStateManager, redis: Redis) -> None:
    task = make_task()
    answers = await asyncio.gather(*(store.enqueue(task) for _ in range(50)))
    assert sum(new for _, new in answers) == 1
    check_job(redis, task.job_id)
    assert (await store.cancel(task.job_id, "x")).found == "cancelled_now"


async def test_a_late_answer_beside_a_decision_tells_both(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(2)
    await store.enqueue(task)
    _, lease = await granted(store, task)
    for call in task.tools:
        assert await store.mark_start(lease, call, LEASE_MS) == "ok"
    unknown = ending(Status.UNKNOWN, task.job_id, ("c1", "c2"))
    assert await store.finish(lease, unknown, Changes()) == "ok"
    answer = await store.resolve(task.job_id, "c1", "completed", result("c1"), "seen", "alice")
    assert answer.verdict == "waiting"
    assert await store.finish(lease, ending(Status.COMPLETED), told("c2")) == "ok"
    record = await store.get(task.job_id)
    assert record is not None
    assert (record.status, record.generation, record.decisions) == (Status.COMPLETED, 2, ())
    opened = next(e for e in await store.events(task.job_id) if e.generation == 2)
    assert (opened.type, opened.data["reason"]) == (EventType.JOB_QUEUED, "answered")
    decisions = opened.data["decisions"]
    assert isinstance(decisions, list)
    assert [(one["tool_call_id"], one["by"]) for one in decisions if isinstance(one, dict)] == [("c1", "alice")]
    check_job(redis, task.job_id)
