"""However a job ends, it keeps the results it has, and a retry runs only the calls without a good one."""

from __future__ import annotations

import pytest
from redis import Redis

from tests.background_jobs.harness import Fleet, open_fleet, running_worker
from tests.background_jobs.making import LEASE_MS, result
from tests.conftest import SettingsFactory
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.ports import Changes, Granted, Lease
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.task_models import JobRecord, Status
from toolfleet.settings import Settings


async def outcomes(fleet: Fleet, record: JobRecord) -> dict[str, str]:
    """The stored results: call to status."""
    return {call: found.status for call, found in (await fleet.service.results(record)).items()}


async def stored(fleet: Fleet, job_id: str, *calls: str) -> None:
    """Until the running attempt has written the results of these calls."""

    async def there() -> bool:
        return set(calls) <= set(await fleet.core.store.results(job_id))

    await wait_until(there, f"{calls} are stored")


async def retried(fleet: Fleet, job_id: str) -> JobRecord:
    """The record after a retry that has all it needs; what it ran is in the bench."""
    fleet.bench.gate.set()
    fleet.bench.started.clear()
    await fleet.service.retry(job_id)
    record = await fleet.over(job_id)
    await fleet.queue_is_empty()
    assert (record.status, record.completed_calls, record.failed_calls) == (Status.COMPLETED, 3, 0)
    return record


def ran(fleet: Fleet) -> list[str]:
    return sorted(entry.partition(":")[0] for entry in fleet.bench.started)


@pytest.mark.promise("G4")
@pytest.mark.parametrize("how", ["rejected", "lost"])
async def test_one_call_of_three_has_failed(settings: Settings, how: str) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo", ("fail", {"how": how, "times": 1}), "once_echo", max_retries=0)
        record = await fleet.over(job_id)
        assert record.status is Status.FAILED
        # The failed call has a result, which says that it failed: it counts as one without.
        assert await outcomes(fleet, record) == {"c1": "completed", "c2": "failed", "c3": "completed"}
        record = await retried(fleet, job_id)
        assert ran(fleet) == ["c2"]
        assert await outcomes(fleet, record) == dict.fromkeys(("c1", "c2", "c3"), "completed")


@pytest.mark.promise("G4")
async def test_the_job_was_cancelled(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("once_echo", "hold", "hold")
        await fleet.began("c3:1")
        await fleet.service.cancel(job_id)
        record = await fleet.over(job_id)
        assert record.status is Status.CANCELLED
        assert (await outcomes(fleet, record))["c1"] == "completed"
        await retried(fleet, job_id)
        assert ran(fleet) == ["c2", "c3"]


@pytest.mark.promise("G4")
async def test_its_running_time_was_used_up(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("once_echo", "hold", "hold", timeout_seconds=0.5)
        record = await fleet.over(job_id)
        assert record.error is not None
        assert (record.status, record.error.code) == (Status.FAILED, "timeout")
        assert (await outcomes(fleet, record))["c1"] == "completed"
        await retried(fleet, job_id)
        assert ran(fleet) == ["c2", "c3"]


@pytest.mark.promise("G4")
async def test_it_became_a_dead_letter(settings: Settings, redis: Redis) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("once_echo", "hold", "hold")
        task = (await fleet.record(job_id)).task
        for number in range(3):
            answer = await fleet.core.store.claim(
                task, token=f"t{number}", worker="killed", lease_ms=LEASE_MS, published_at=None
            )
            assert isinstance(answer, Granted)
            if not number:
                await fleet.core.store.progress(Lease(job_id, answer.fence), Changes(results=(result("c1"),)), 1)
            _run_out(redis, job_id)
        async with running_worker(settings, fleet.bench):
            record = await fleet.over(job_id)
            assert record.error is not None
            assert (record.status, record.error.code) == (Status.FAILED, "too_many_starts")
            assert await outcomes(fleet, record) == {"c1": "completed"}
            await retried(fleet, job_id)
        assert ran(fleet) == ["c2", "c3"]


@pytest.mark.promise("G2")
@pytest.mark.promise("G4")
async def test_the_lease_was_lost_to_another_attempt(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, redis: Redis
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, lease=0.9, ack_wait=2.0)
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("once_echo", "hold", "hold")
        await fleet.began("c3:1")
        await stored(fleet, job_id, "c1")
        task = (await fleet.record(job_id)).task
        _run_out(redis, job_id)
        thief = await fleet.core.store.claim(task, token="thief", worker="thief", lease_ms=1, published_at=None)
        assert isinstance(thief, Granted)
        assert dict(thief.done) == {"c1": "completed"}
        await wait_until(lambda: sorted(fleet.bench.stopped) == ["c2", "c3"], "the loser has stopped its tools")
        fleet.bench.started.clear()
        fleet.bench.gate.set()
        record = await fleet.over(job_id)
        assert (record.status, record.completed_calls) == (Status.COMPLETED, 3)
        assert ran(fleet) == ["c2", "c3"]
        await fleet.queue_is_empty()


def _run_out(redis: Redis, job_id: str) -> None:
    """A lease that nobody renewed in time."""
    redis.hset(f"{root_of(job_id)}:job:{job_id}", "lease_until", 1)
