"""Runs that do not go on are taken from their attempts, and their streams are told."""

from __future__ import annotations

import pytest
from redis import Redis

from tests.background_jobs.dumping import check_job, log_of, record_of
from tests.background_jobs.harness import Fleet, open_fleet, running_worker
from tests.background_jobs.making import LEASE_MS, ending, make_task, told
from tests.conftest import SettingsFactory
from toolfleet.services.background_jobs.ports import Granted, Lease, Orphan
from toolfleet.services.background_jobs.reconciler import Reconciler
from toolfleet.services.background_jobs.redis_records import partition_of, root_of
from toolfleet.services.background_jobs.redis_state_manager import RedisStateManager
from toolfleet.services.background_jobs.task_models import JobEvent, Status, TaskDefinition, Tier
from toolfleet.settings import Settings

STUCK_MS = 300_000
HOUR_MS = 3_600_000


async def running(store: RedisStateManager, task: TaskDefinition) -> Lease:
    answer = await store.claim(task, token="t", worker="w1", lease_ms=LEASE_MS, published_at=None)
    assert isinstance(answer, Granted)
    return Lease(task.job_id, answer.fence)


def ago(redis: Redis, job_id: str, field: str, millis: int) -> None:
    """Put a moment of a record that far into the past, by the server's clock."""
    seconds, micros = redis.time()  # type: ignore[misc]  # redis-py's types join the blocking and the async client
    redis.hset(f"{root_of(job_id)}:job:{job_id}", field, seconds * 1000 + micros // 1000 - millis)


async def look(store: RedisStateManager, redis: Redis, job_id: str) -> list[Orphan]:
    redis.zadd(f"{root_of(job_id)}:due", {job_id: 1})
    return list(await store.orphans(partition_of(job_id), 100, STUCK_MS))


def last_event(redis: Redis, task: TaskDefinition) -> JobEvent:
    return log_of(redis, task.job_id)[-1]


# -- a lease that is renewed, and a run that does not end --------------------------------------------------------------


@pytest.mark.leaves_open_jobs
async def test_a_run_within_its_time_is_left_alone(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(timeout_ms=HOUR_MS)
    await running(store, task)
    ago(redis, task.job_id, "run_from", HOUR_MS + STUCK_MS - 60_000)
    assert await look(store, redis, task.job_id) == []
    orphan = Orphan(task.job_id, Status.RUNNING, 1, 1, task)
    assert await store.end_overrun(orphan, STUCK_MS) == "changed"


@pytest.mark.promise("G2")
async def test_a_run_far_beyond_its_time_fails_and_its_attempt_is_lost(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(2, timeout_ms=HOUR_MS)
    lease = await running(store, task)
    await store.progress(lease, told("c1"), 1)
    ago(redis, task.job_id, "run_from", HOUR_MS + STUCK_MS + 1)
    (orphan,) = await look(store, redis, task.job_id)
    assert orphan.trouble == "overrun"
    assert await store.end_overrun(orphan, STUCK_MS) == "settled"
    event = last_event(redis, task)
    assert (event.type, event.data["reason"], event.data["error"]["code"]) == ("job.failed", "stuck", "timeout")
    assert await store.renew([lease], LEASE_MS) == ["lost"]
    assert await store.progress(lease, told("c2"), 2) == "lost"
    assert await store.finish(lease, ending(Status.COMPLETED), told("c2")) == "lost"
    assert await store.end_overrun(orphan, STUCK_MS) == "changed"
    assert list(await store.results(task.job_id)) == ["c1"], "what it has is kept"
    check_job(redis, task.job_id)


@pytest.mark.promise("G5")
async def test_a_stuck_call_that_must_not_run_twice_becomes_unknown(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(2, timeout_ms=HOUR_MS)
    lease = await running(store, task)
    assert await store.mark_start(lease, task.tools[1], LEASE_MS) == "ok"
    ago(redis, task.job_id, "run_from", HOUR_MS + STUCK_MS + 1)
    (orphan,) = await look(store, redis, task.job_id)
    assert await store.end_overrun(orphan, STUCK_MS) == "settled"
    event = last_event(redis, task)
    assert (event.type, event.data["reason"], event.data["calls"]) == ("job.unknown", "stuck", ["c2"])
    assert await store.renew([lease], LEASE_MS) == ["lost"]
    check_job(redis, task.job_id)


@pytest.mark.promise("G8")
async def test_a_stuck_run_that_was_to_be_cancelled_is(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(2, timeout_ms=HOUR_MS)
    lease = await running(store, task)
    await store.progress(lease, told("c1"), 1)
    await store.cancel(task.job_id, "enough")
    ago(redis, task.job_id, "run_from", HOUR_MS + STUCK_MS + 1)
    (orphan,) = await look(store, redis, task.job_id)
    assert await store.end_overrun(orphan, STUCK_MS) == "settled"
    data = last_event(redis, task).data
    assert (data["reason"], data["reached"], data["still_running"]) == ("enough", "requested", ["c2"])
    assert [call["state"] for call in data["calls"]] == ["ended", "not_told"]


# -- a lease that ran out, and a message that wakes nobody -------------------------------------------------------------


@pytest.mark.leaves_open_jobs
async def test_a_dead_run_is_looked_at_again_when_it_counts_as_stuck(store: RedisStateManager, redis: Redis) -> None:
    task = make_task(timeout_ms=HOUR_MS)
    await running(store, task)
    ago(redis, task.job_id, "created", 10 * HOUR_MS)
    ago(redis, task.job_id, "lease_until", STUCK_MS - 60_000)
    (orphan,) = await look(store, redis, task.job_id)
    assert orphan.trouble == "lease_expired"
    until, due = record_of(redis, task.job_id)["lease_until"], redis.zscore(f"{root_of(task.job_id)}:due", task.job_id)
    assert due == int(until) + STUCK_MS + 1, "not after half of its age"
    ago(redis, task.job_id, "lease_until", STUCK_MS + 1)
    (orphan,) = await look(store, redis, task.job_id)
    assert orphan.trouble == "stuck"
    assert await store.reclaim(orphan) == "publish"
    event = last_event(redis, task)
    assert (event.type, event.data["reason"]) == ("job.queued", "stuck")
    check_job(redis, task.job_id)


async def taken(fleet: Fleet) -> TaskDefinition:
    """The task of the next message, which stays in these hands."""
    client, names = fleet.core.connection.client, fleet.core.queue.names
    inbox = await client.subscribe(client.new_inbox())
    consumer = f"$JS.API.CONSUMER.MSG.NEXT.{names.tasks}.{names.consumer(Tier.NORMAL)}"
    await client.publish(consumer, b'{"batch": 1}', reply=inbox.subject)
    message = await inbox.next_msg(timeout=10)
    await inbox.unsubscribe()
    return TaskDefinition.from_json(message.data)


async def reconciled(fleet: Fleet, redis: Redis, job_id: str) -> int:
    redis.zadd(f"{root_of(job_id)}:due", {job_id: 1})
    reconciler = Reconciler(fleet.core.store, fleet.core.queue, interval_s=3600, stuck_s=STUCK_MS / 1000)
    return await reconciler.look()


@pytest.mark.promise("G1")
async def test_a_dead_run_whose_message_wakes_nobody_is_published_again(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, redis: Redis
) -> None:
    # Whoever has the message may keep it for an hour.
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, ack_wait=3600)
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        await running(fleet.core.store, await taken(fleet))
        ago(redis, job_id, "lease_until", STUCK_MS - 60_000)
        assert await reconciled(fleet, redis, job_id) == 0, "it is left to its redelivery first"
        ago(redis, job_id, "lease_until", STUCK_MS + 1)
        assert await reconciled(fleet, redis, job_id) == 1
        async with running_worker(settings, fleet.bench):
            record = await fleet.over(job_id)
        assert (record.status, record.starts, fleet.bench.started) == (Status.COMPLETED, 2, ["c1:2"])
        queued = [event.data for event in await fleet.log(job_id) if event.type == "job.queued"]
        assert queued[-1]["reason"] == "stuck"
        await fleet.queue_is_empty()


async def test_a_job_that_waits_behind_others_is_not_stuck(settings: Settings, redis: Redis) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        ago(redis, job_id, "created", 100 * HOUR_MS)
        before = await fleet.record(job_id)
        assert await reconciled(fleet, redis, job_id) == 0
        assert await fleet.record(job_id) == before
        assert await fleet.core.queue.stands(job_id)
        await fleet.core.queue.purge(job_id)
        assert await reconciled(fleet, redis, job_id) == 1, "it is only its message that it waits for"
        async with running_worker(settings, fleet.bench):
            assert (await fleet.over(job_id)).status is Status.COMPLETED


@pytest.mark.promise("G2")
@pytest.mark.parametrize("tool", ["hold", "once_hold"])
async def test_a_worker_that_does_not_end_its_job_in_time_loses_it(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, redis: Redis, tool: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, concurrency=1, lease=0.9)
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(tool, timeout_seconds=3600)
        await fleet.began("c1:1")
        ago(redis, job_id, "run_from", HOUR_MS + STUCK_MS + 1)
        assert await reconciled(fleet, redis, job_id) == 1
        record = await fleet.over(job_id)
        assert record.status is (Status.FAILED if tool == "hold" else Status.UNKNOWN)
        assert (await fleet.over(await fleet.submit("echo"))).status is Status.COMPLETED, "its slot is free"
        assert fleet.bench.stopped == ["c1"]
        assert await fleet.record(job_id) == record
        await fleet.queue_is_empty()
