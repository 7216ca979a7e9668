"""What happens to jobs while a server is down, slow, full or replaced."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from tests.background_jobs.harness import job, open_fleet, running_worker
from tests.background_jobs.making import make_task
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_core, prepare_queue
from toolfleet.services.background_jobs.errors import QueueUnavailable, StoreUnavailable, StreamMismatch
from toolfleet.services.background_jobs.ports import Granted, Lease
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.task_models import Status, Tier
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

# -- Redis -----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("G1")
async def test_a_job_is_accepted_and_run_although_redis_was_down(
    own_settings: Settings, own_valkey: EmbeddedValkey
) -> None:
    async with open_fleet(own_settings) as fleet:
        await own_valkey.stop()
        submission = await fleet.service.submit(job("echo"), idempotency_key="k", known_key=False)
        assert (submission.record, submission.created) == (None, True)
        view = await fleet.service.get(submission.job_id)
        assert (view.record, view.degraded) == (None, True)
        again = await fleet.service.submit(job("echo"), idempotency_key="k")
        assert (again.job_id, again.created) == (submission.job_id, False)
        await own_valkey.start()
        record = await fleet.reaches(submission.job_id, Status.COMPLETED)
        assert (record.last_event, fleet.bench.started) == (5, ["c1:1"])
        await fleet.queue_is_empty()


@pytest.mark.promise("G1")
async def test_a_job_that_runs_while_redis_is_away_ends_when_it_is_back(
    own_settings: Settings, own_valkey: EmbeddedValkey
) -> None:
    async with open_fleet(own_settings) as fleet:
        job_id = await fleet.submit("hold", "once_hold")
        await fleet.began("c1:1")
        await fleet.began("c2:1")
        watching = asyncio.create_task(fleet.over(job_id))
        await own_valkey.pause()
        fleet.bench.gate.set()
        # The call that waits for its answer is the one that notices.
        await wait_until(lambda: not fleet.workers[0]._gate.is_open, "the worker knows that Redis is away")
        await own_valkey.resume()
        assert (await watching).status is Status.COMPLETED
        await own_valkey.restart()
        record = await fleet.over(job_id)
        assert (record.starts, record.completed_calls) == (1, 2)
        await fleet.queue_is_empty()


async def test_somebody_who_waits_for_a_job_waits_through_a_restart_of_redis(
    own_settings: Settings, own_valkey: EmbeddedValkey
) -> None:
    async with open_fleet(own_settings) as fleet:
        job_id = await fleet.submit("hold")
        watching = asyncio.create_task(fleet.over(job_id))
        await fleet.began("c1:1")
        await own_valkey.restart()
        fleet.bench.gate.set()
        assert (await watching).status is Status.COMPLETED


@pytest.mark.promise("G2")
async def test_a_lease_that_can_not_be_renewed_stops_its_tools(
    own_settings: Settings, own_valkey: EmbeddedValkey
) -> None:
    async with open_fleet(own_settings.model_copy(update={"lease": 0.6})) as fleet:
        job_id = await fleet.submit("hold")
        await fleet.began("c1:1")
        await own_valkey.pause()
        await wait_until(lambda: fleet.bench.stopped == ["c1"], "the tool is stopped")
        await own_valkey.resume()
        fleet.bench.gate.set()
        record = await fleet.over(job_id)
        assert (record.status, record.fence, record.starts) == (Status.COMPLETED, 2, 2)
        assert fleet.bench.started == ["c1:1", "c1:2"]
        await fleet.queue_is_empty()


async def test_a_store_without_memory_is_a_store_that_is_down(own_settings: Settings) -> None:
    async with open_fleet(own_settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        await fleet.core.client.config_set("maxmemory", "1")
        async with running_worker(own_settings, fleet.bench) as worker:
            await wait_until(lambda: not worker._gate.is_open, "the worker has been refused")
            await fleet.core.client.config_set("maxmemory", "0")
            record = await fleet.over(job_id)
            assert (record.status, record.starts) == (Status.COMPLETED, 1)


async def test_answers_after_a_time_out_belong_to_their_questions(
    own_settings: Settings, own_valkey: EmbeddedValkey
) -> None:
    async with open_core(own_settings, name="test") as core:
        tasks = [make_task() for _ in range(20)]
        for task in tasks:
            await core.store.enqueue(task)
        await own_valkey.pause()
        late = await asyncio.gather(*(core.store.get(task.job_id) for task in tasks[:10]), return_exceptions=True)
        assert all(isinstance(answer, StoreUnavailable) for answer in late)
        await own_valkey.resume()
        async with asyncio.timeout(5):
            await core.store.gate.wait()
        found = await asyncio.gather(*(core.store.get(task.job_id) for task in tasks))
        assert [record.job_id for record in found if record] == [task.job_id for task in tasks]


# -- NATS ------------------------------------------------------------------------------------------------------------


@pytest.mark.promise("G12")
async def test_with_the_queue_down_a_caller_gets_a_run_or_a_refusal(
    own_settings: Settings, own_nats: EmbeddedNats
) -> None:
    async with open_fleet(own_settings, workers=0, runs_jobs=True) as fleet:
        await own_nats.stop()
        await wait_until(lambda: not fleet.core.queue.connected, "the connection is known to be gone")
        with pytest.raises(QueueUnavailable) as caught:
            await fleet.submit("echo")
        assert not caught.value.maybe_stored
        assert "job_id" in caught.value.details
        ran = await fleet.service.submit(job("echo", fallback="sync"))
        assert ran.record is not None
        assert (ran.ran, ran.record.status) == (True, Status.COMPLETED)
        assert ran.fallback_reason
        assert (await fleet.kinds(ran.job_id))[-1] == "job.completed"
        assert fleet.bench.started == ["c1:1"]


@pytest.mark.promise("G12")
@pytest.mark.parametrize("tool", ["echo", "fail", "once_fail"])
async def test_with_queue_and_store_down_a_run_says_how_it_went(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey, tool: str
) -> None:
    async with open_fleet(own_settings, workers=0, runs_jobs=True) as fleet:
        await own_nats.stop()
        await own_valkey.stop()
        await wait_until(lambda: not fleet.core.queue.connected, "the connection is known to be gone")
        ran = await fleet.service.submit(job((tool, {"how": "lost"}), fallback="sync"))
        assert (ran.ran, ran.record) == (True, None)
        assert ran.results is not None
        assert fleet.bench.started == ["c1:1"]
        if tool == "echo":
            assert (ran.results["c1"].status, ran.error) == ("completed", None)
        else:
            assert ran.error is not None
            assert ran.error.code == ("outcome_unknown" if tool == "once_fail" else "connection_lost")


@pytest.mark.promise("G12")
async def test_a_run_that_may_stand_in_the_queue_is_not_run_twice(
    own_settings: Settings, own_nats: EmbeddedNats
) -> None:
    async with open_fleet(own_settings, workers=0, runs_jobs=True) as fleet:
        await own_nats.pause()
        ran = await fleet.service.submit(job("echo", fallback="sync"))
        assert ran.ran
        await own_nats.resume()
        async with running_worker(own_settings, fleet.bench):
            await fleet.queue_is_empty()
        assert fleet.bench.started == ["c1:1"]


@pytest.mark.promise("G12")
async def test_a_claim_whose_answer_was_lost_is_not_run_beside_it(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey
) -> None:
    async with open_fleet(own_settings, workers=0, runs_jobs=True) as fleet:
        await own_nats.pause()
        await own_valkey.pause()
        with pytest.raises(QueueUnavailable) as caught:
            await fleet.service.submit(job("echo", fallback="sync"))
        assert caught.value.maybe_stored
        await own_valkey.resume()
        await own_nats.resume()
        assert fleet.bench.started == []
        async with running_worker(own_settings, fleet.bench):
            await fleet.queue_is_empty()


@pytest.mark.promise("G1")
async def test_a_worker_goes_on_through_a_restart_of_nats(own_settings: Settings, own_nats: EmbeddedNats) -> None:
    async with open_fleet(own_settings) as fleet:
        before = await fleet.submit("hold")
        await fleet.began("c1:1")
        waiting = await fleet.submit("echo", delay_seconds=1)
        await own_nats.restart()
        fleet.bench.gate.set()
        assert (await fleet.over(before)).status is Status.COMPLETED

        async def accepted() -> str | None:
            try:
                return await fleet.submit("echo")
            except QueueUnavailable:
                return None

        after = await wait_until(accepted, "a job is accepted again")
        assert after is not None
        for job_id in (after, waiting):
            assert (await fleet.over(job_id)).starts == 1
        await fleet.queue_is_empty()


@pytest.mark.promise("G1")
async def test_a_job_ends_without_nats_and_its_message_is_settled_later(
    own_settings: Settings, own_nats: EmbeddedNats
) -> None:
    async with open_fleet(own_settings) as fleet:
        job_id = await fleet.submit("hold", "once_hold")
        await fleet.began("c2:1")
        await own_nats.kill()
        await wait_until(lambda: not fleet.core.queue.connected, "the connection is known to be gone")
        fleet.bench.gate.set()
        assert (await fleet.over(job_id)).status is Status.COMPLETED
        await own_nats.start()
        await wait_until(lambda: fleet.core.queue.connected, "the connection is back")
        await fleet.queue_is_empty()
        assert sorted(fleet.bench.started) == ["c1:1", "c2:1"]


@pytest.mark.promise("G1")
@pytest.mark.promise("G12")
@pytest.mark.parametrize("how", ["gone", "stopped"])
async def test_when_both_are_back_nothing_of_ours_needs_a_restart(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey, how: str
) -> None:
    async with open_fleet(own_settings) as fleet:
        before = await fleet.submit("hold")
        await fleet.began("c1:1")
        for server in (own_nats, own_valkey):
            await (server.kill() if how == "gone" else server.pause())
        with pytest.raises(QueueUnavailable):
            await fleet.submit("echo")
        await wait_until(lambda: not fleet.workers[0]._gate.is_open, "the worker knows that Redis is away")
        fleet.bench.gate.set()
        for server in (own_valkey, own_nats):
            await (server.start() if how == "gone" else server.resume())

        async def accepted() -> str | None:
            try:
                return await fleet.submit("echo")
            except QueueUnavailable:
                return None

        after = await wait_until(accepted, "a job is accepted again")
        assert after is not None
        for job_id in (after, before):
            record = await fleet.reaches(job_id, Status.COMPLETED)
            assert record.starts == 1
        await fleet.queue_is_empty()


async def test_a_program_starts_without_nats_and_works_when_it_comes(
    own_settings: Settings, own_nats: EmbeddedNats
) -> None:
    await own_nats.stop()
    async with open_fleet(own_settings, workers=0) as fleet:
        assert not fleet.core.queue_state.ready
        with pytest.raises(QueueUnavailable):
            await fleet.submit("echo")
        await own_nats.start()
        await wait_until(lambda: fleet.core.queue_state.ready, "the streams are made")
        async with running_worker(own_settings, fleet.bench):
            assert (await fleet.over(await fleet.submit("echo"))).status is Status.COMPLETED


async def test_a_stream_that_was_swapped_for_an_empty_one_is_refused(
    own_settings: Settings, own_nats: EmbeddedNats
) -> None:
    async with open_core(own_settings, name="test") as core:
        await core.connection.client.jsm().delete_stream(own_settings.stream)
        await core.connection.client.jsm().delete_stream(own_settings.dlq_stream)
        await prepare_queue(core)
        assert core.queue_state.mismatch is not None
    with pytest.raises(StreamMismatch, match="accept-stream"):
        async with open_core(own_settings, name="test"):
            pass


# -- the reconciler --------------------------------------------------------------------------------------------------


@pytest.mark.promise("G1")
async def test_a_job_whose_message_is_gone_is_published_again_and_runs_once(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        ids = [await fleet.submit("echo", delay_seconds=0.3) for _ in range(3)]
        for job_id in ids:
            assert await fleet.core.queue.purge(job_id)
            await _is_due(fleet.core.client, job_id)
        assert await fleet.workers[0]._reconciler.look() == 3
        for job_id in ids:
            assert (await fleet.over(job_id)).starts == 1
        await fleet.queue_is_empty()


async def test_a_job_whose_message_stands_is_left_to_it(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("hold")
        await fleet.began("c1:1")
        queued = await fleet.submit("echo", delay_seconds=0.2)
        for each in (job_id, queued):
            await _is_due(fleet.core.client, each)
        assert await fleet.workers[0]._reconciler.look() == 0
        fleet.bench.gate.set()
        for each in (job_id, queued):
            assert (await fleet.over(each)).fence == 1


@pytest.mark.promise("G1")
async def test_a_synchronous_run_whose_process_died_is_run_by_a_worker(settings: Settings) -> None:
    task = make_task(tool="echo")
    async with open_fleet(settings) as fleet:
        # A claim without a message, and then nothing more is heard of it.
        await fleet.core.store.claim(task, token="t", worker="api", lease_ms=1, published_at=None)
        await _is_due(fleet.core.client, task.job_id, lease_until=1)
        assert await fleet.workers[0]._reconciler.look() == 1
        record = await fleet.over(task.job_id)
        assert (record.status, record.starts, fleet.bench.started) == (Status.COMPLETED, 2, ["c1:2"])


@pytest.mark.promise("G5")
async def test_a_started_call_of_a_dead_synchronous_run_waits_for_a_person(settings: Settings) -> None:
    task = make_task(tool="once_echo")
    async with open_fleet(settings) as fleet:
        store = fleet.core.store
        answer = await store.claim(task, token="t", worker="api", lease_ms=60_000, published_at=None)
        assert isinstance(answer, Granted)
        await store.mark_start(Lease(task.job_id, answer.fence), task.tools[0], 1)
        await _is_due(fleet.core.client, task.job_id, lease_until=1)
        assert await fleet.workers[0]._reconciler.look() == 1
        record = await fleet.record(task.job_id)
        assert (record.status, record.undecided, fleet.bench.started) == (Status.UNKNOWN, ("c1",), [])


async def test_a_consumer_that_is_gone_is_made_again(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        await fleet.core.connection.client.jsm().delete_consumer(settings.stream, "workers-low")
        await fleet.workers[0]._reconciler.look()
        assert not await fleet.core.queue.ensure_consumer(Tier.LOW)


async def _is_due(client: Redis, job_id: str, **fields: int) -> None:
    """As if the grace time, and any lease or delay, were over."""
    await client.zadd(f"{root_of(job_id)}:due", {job_id: 1})
    await client.hset(f"{root_of(job_id)}:job:{job_id}", mapping={"not_before": 0} | fields)
