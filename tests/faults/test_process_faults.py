"""Processes of ours that die or sleep between two steps, each place alone; the audit of the chaos runs looks on.

A worker that dies in a call, or sleeps in one past its lease, is in tests/background_jobs/test_processes.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.crew import Crew, open_crew
from tests.chaos.living import kill_at, stop_at
from toolfleet.services.background_jobs.task_models import JobRecord, Status
from toolfleet.settings import Settings

PATIENT: dict[str, Any] = {"lease": 30.0}
"""Of a worker that keeps what it takes, on however busy a machine."""


@pytest.fixture
async def crew(settings: Settings, tmp_path: Path) -> AsyncIterator[Crew]:
    async with open_crew(settings, tmp_path, short_grace=True) as crew:
        yield crew
        assert (await crew.verdict()).findings == ()


async def followed(crew: Crew, job_id: str) -> JobRecord:
    """What becomes of a job with a worker to which nothing happens."""
    await crew.worker(**PATIENT)
    return await crew.over(job_id)


# -- a worker dies -------------------------------------------------------------------------------------------------


@pytest.mark.promise("G1")
async def test_between_effect_and_stored_result_what_may_run_twice_is_run_again(crew: Crew) -> None:
    first = await crew.worker(kill_at("after-effect-before-result"))
    job_id = await crew.submits("work")
    await first.dies_at("after-effect-before-result")
    record = await followed(crew, job_id)
    assert (record.status, record.starts) == (Status.COMPLETED, 2)
    assert crew.effects() == [("c1", 1), ("c1", 2)]


@pytest.mark.promise("G5")
async def test_between_effect_and_stored_result_what_must_not_run_twice_waits_for_a_person(crew: Crew) -> None:
    first = await crew.worker(kill_at("after-effect-before-result"))
    job_id = await crew.submits("once_work")
    await first.dies_at("after-effect-before-result")
    record = await followed(crew, job_id)
    assert (record.status, record.undecided) == (Status.UNKNOWN, ("c1",))
    assert crew.effects() == [("c1", 1)]


@pytest.mark.promise("G4")
async def test_a_result_that_was_stored_is_not_run_for_again(crew: Crew) -> None:
    first = await crew.worker(kill_at("before-finish"))
    # The second call keeps the job open until the first one's result has been written.
    job_id = await crew.submits("work", "work", args={"ms": 1000})
    await first.dies_at("before-finish")
    stored = {call for call, _ in (await crew.wired.core.store.results(job_id)).items()}
    record = await followed(crew, job_id)
    assert record.status is Status.COMPLETED
    assert {call for call, attempt in crew.effects() if attempt == 2} == {"c1", "c2"} - stored


@pytest.mark.promise("G1")
async def test_between_finish_and_ack_the_message_is_acked_by_whoever_gets_it_next(crew: Crew) -> None:
    first = await crew.worker(kill_at("after-finish-before-ack"))
    job_id = await crew.submits("once_work")
    await first.dies_at("after-finish-before-ack")
    ended = await crew.record(job_id)
    assert await crew.wired.core.queue.stands(job_id)
    assert await followed(crew, job_id) == ended
    assert crew.effects() == [("c1", 1)]


@pytest.mark.promise("G1")
@pytest.mark.parametrize("point", ["after-claim-before-run", "before-start-mark"])
async def test_between_claim_and_run_nothing_has_happened_yet(crew: Crew, point: str) -> None:
    first = await crew.worker(kill_at(point))
    job_id = await crew.submits("once_work")
    await first.dies_at(point)
    assert crew.effects() == []
    record = await followed(crew, job_id)
    assert (record.status, record.starts) == (Status.COMPLETED, 2)
    assert crew.effects() == [("c1", 2)]


async def test_between_mark_and_call_a_person_is_asked_since_nobody_can_know(crew: Crew) -> None:
    first = await crew.worker(kill_at("after-start-mark-before-last-check"))
    job_id = await crew.submits("once_work")
    await first.dies_at("after-start-mark-before-last-check")
    assert (await followed(crew, job_id)).status is Status.UNKNOWN
    assert crew.effects() == []


async def test_between_retry_and_nak_the_retry_is_counted_once(crew: Crew) -> None:
    first = await crew.worker(kill_at("after-retry-before-nak"))
    job_id = await crew.submits("fail", args={"times": 1})
    await first.dies_at("after-retry-before-nak")
    record = await followed(crew, job_id)
    assert (record.status, record.retries, record.starts) == (Status.COMPLETED, 1, 2)


@pytest.mark.promise("G9")
@pytest.mark.parametrize("point", ["after-dead-letter-before-finish", "after-dead-finish-before-ack"])
async def test_a_worker_that_dies_while_it_buries_a_job_is_followed_by_one_that_does_not(
    settings: Settings, tmp_path: Path, point: str
) -> None:
    async with open_crew(settings, tmp_path, overrides={"max_starts": 1}) as crew:
        first = await crew.worker(kill_at("after-claim-before-run"))
        job_id = await crew.submits("work")
        await first.dies_at("after-claim-before-run")
        second = await crew.worker(kill_at(point))
        await second.dies_at(point)
        record = await followed(crew, job_id)
        assert record.error is not None
        assert (record.status, record.error.code) == (Status.FAILED, "too_many_starts")
        assert crew.effects() == []
        assert (await crew.verdict()).findings == ()


async def test_a_reconciler_that_dies_before_it_publishes_is_followed_by_another(crew: Crew) -> None:
    first = await crew.worker(kill_at("after-effect-before-result"))
    job_id = await crew.submits("work")
    await first.dies_at("after-effect-before-result")
    # Nothing is left but the record, which says that a dead attempt runs.
    assert await crew.wired.core.queue.purge(job_id)
    second = await crew.worker(kill_at("after-reclaim-before-publish"), recovery_check_interval=0.2)
    await second.dies_at("after-reclaim-before-publish")
    await crew.worker(recovery_check_interval=0.2, **PATIENT)
    assert (await crew.over(job_id)).status is Status.COMPLETED


# -- a worker sleeps -----------------------------------------------------------------------------------------------


@pytest.mark.promise("G2")
async def test_two_workers_have_one_delivery_and_one_of_them_runs_it(crew: Crew) -> None:
    sleeper = await crew.worker(stop_at("after-delivery-before-claim"))
    job_id = await crew.submits("once_work", args={"until": str(crew.gate)})
    await sleeper.stops_at("after-delivery-before-claim")
    await crew.worker(**PATIENT)
    await crew.begun("c1", 1)
    sleeper.go_on()
    # What it has in hand it takes to its end first: it asks for the job, and hears that another one holds it.
    await sleeper.leave()
    crew.gate.touch()
    record = await crew.over(job_id)
    assert (record.status, record.starts, record.fence) == (Status.COMPLETED, 1, 1)
    assert crew.effects() == [("c1", 1)]


@pytest.mark.promise("G5")
async def test_a_worker_that_slept_between_mark_and_call_does_not_call(crew: Crew) -> None:
    sleeper = await crew.worker(stop_at("after-start-mark-before-last-check"))
    job_id = await crew.submits("once_work")
    await sleeper.stops_at("after-start-mark-before-last-check")
    record = await followed(crew, job_id)
    assert record.status is Status.UNKNOWN
    sleeper.go_on()
    await sleeper.leave()
    assert crew.effects() == []
    assert await crew.record(job_id) == record


@pytest.mark.promise("G2")
@pytest.mark.parametrize("point", ["before-finish", "before-renewal", "after-claim-before-run", "before-retry"])
async def test_a_worker_that_slept_past_its_lease_changes_nothing_wherever_it_slept(crew: Crew, point: str) -> None:
    sleeper = await crew.worker(stop_at(point))
    tool, args = ("fail", {"times": 1}) if point == "before-retry" else ("work", {"ms": 1500})
    job_id = await crew.submits(tool, args=args)
    await sleeper.stops_at(point)
    record = await followed(crew, job_id)
    assert (record.status, record.starts) == (Status.COMPLETED, 2)
    sleeper.go_on()
    await sleeper.leave()
    assert await crew.record(job_id) == record


# -- an API dies ---------------------------------------------------------------------------------------------------


@pytest.mark.promise("G1")
@pytest.mark.promise("G6")
@pytest.mark.parametrize("point", ["after-publish-ack-before-enqueue", "after-enqueue-before-202"])
async def test_an_api_dies_before_its_202_and_the_same_key_gives_the_job(crew: Crew, point: str) -> None:
    api, client = await crew.api(kill_at(point))
    plan = crew.plan("once_work")
    asking = asyncio.create_task(client.submit(plan.number, plan.body, plan.key))
    await api.dies_at(point)
    client.over.set()
    assert await asking is None
    job_id = await crew.submit(plan)
    assert await crew.wired.core.queue.stands(job_id)
    assert (await followed(crew, job_id)).status is Status.COMPLETED
    assert await crew.submit(plan) == job_id
    assert crew.effects() == [("c1", 1)]


async def test_an_api_dies_before_its_202_and_nobody_asks_again(crew: Crew) -> None:
    api, client = await crew.api(kill_at("after-publish-ack-before-enqueue"))
    plan = crew.plan("work")
    asking = asyncio.create_task(client.submit(plan.number, plan.body, plan.key))
    await api.dies_at("after-publish-ack-before-enqueue")
    client.over.set()
    await asking
    await crew.worker(**PATIENT)
    await crew.begun("c1", 1)
    (job_id,) = {effect["job"] for effect in crew.noted()}
    assert (await crew.over(job_id)).status is Status.COMPLETED


async def test_an_api_dies_between_claim_and_run_and_a_worker_runs_the_job(crew: Crew) -> None:
    api, client = await crew.api(kill_at("after-sync-claim-before-run"))
    plan = crew.plan("once_work", mode="sync")
    asking = asyncio.create_task(client.submit(plan.number, plan.body, plan.key))
    await api.dies_at("after-sync-claim-before-run")
    client.over.set()
    await asking
    await crew.worker(recovery_check_interval=0.2, **PATIENT)
    job_id = await crew.submit(plan)
    record = await crew.over(job_id)
    assert (record.status, record.starts) == (Status.COMPLETED, 2)
    assert crew.effects() == [("c1", 2)]


async def test_an_api_dies_between_cancel_and_purge_and_the_job_does_not_run(crew: Crew) -> None:
    api, client = await crew.api(kill_at("after-cancel-before-purge"))
    job_id = await crew.submits("work")
    cancelling = asyncio.create_task(client.cancel(job_id))
    await api.dies_at("after-cancel-before-purge")
    client.over.set()
    await cancelling
    assert await crew.wired.core.queue.stands(job_id)
    assert (await followed(crew, job_id)).status is Status.CANCELLED
    assert crew.effects() == []


@pytest.mark.parametrize("point", ["after-reopen-before-purge", "after-purge-before-publish"])
async def test_an_api_dies_while_it_opens_a_job_again_and_the_reconciler_goes_on(crew: Crew, point: str) -> None:
    api, client = await crew.api(kill_at(point))
    await crew.worker(recovery_check_interval=0.2, **PATIENT)
    job_id = await crew.submits("fail", args={"times": 1}, max_retries=0)
    assert (await crew.over(job_id)).status is Status.FAILED
    asking = asyncio.create_task(crew.again(job_id, client))
    await api.dies_at(point)
    client.over.set()
    await asking
    assert (await crew.over(job_id, generation=2)).status is Status.COMPLETED
