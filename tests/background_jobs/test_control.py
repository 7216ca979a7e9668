"""What clients do with jobs: submit twice, cancel, watch, wait, retry, resolve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest
from redis import Redis

from tests.background_jobs.dumping import dump
from tests.background_jobs.harness import Fleet, job, open_fleet, running_worker
from tests.background_jobs.making import LEASE_MS, make_task, told
from tests.conftest import SettingsFactory
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.errors import (
    IdempotencyConflict,
    IllegalMove,
    InvalidArguments,
    InvalidTask,
    JobNotFound,
    QueueFull,
    UnknownTool,
)
from toolfleet.services.background_jobs.event_reader import StreamItem
from toolfleet.services.background_jobs.job_control import CancelReceipt
from toolfleet.services.background_jobs.ports import Granted, Lease
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.submit import submit_tool_execution_task
from toolfleet.services.background_jobs.task_models import Gap, JobEvent, Status, iso_time
from toolfleet.services.background_jobs.transitions import CallStop
from toolfleet.settings import Settings

# -- submit ----------------------------------------------------------------------------------------------------------


@pytest.mark.promise("G6")
async def test_one_key_is_one_job_however_often_and_from_wherever(settings: Settings) -> None:
    async with open_fleet(settings) as fleet, open_fleet(settings, workers=0) as other:
        services = [fleet.service, other.service]
        submissions = await asyncio.gather(
            *(services[n % 2].submit(job("echo"), idempotency_key="k") for n in range(50))
        )
        assert len({s.job_id for s in submissions}) == 1
        assert sum(s.created for s in submissions) == 1
        await fleet.over(submissions[0].job_id)
        late = await other.service.submit(job("echo"), idempotency_key="k")
        assert (late.job_id, late.created) == (submissions[0].job_id, False)
        assert fleet.bench.started == ["c1:1"]
        with pytest.raises(IdempotencyConflict):
            await fleet.service.submit(job("hold"), idempotency_key="k")
        assert (await fleet.service.submit(job("hold"), idempotency_key="k", tenant="other")).created
        fleet.bench.gate.set()
        await fleet.queue_is_empty()
    async with open_fleet(settings, workers=0) as restarted:
        again = await restarted.service.submit(job("echo"), idempotency_key="k")
        assert (again.job_id, again.created) == (late.job_id, False)
        with pytest.raises(IdempotencyConflict):
            await restarted.service.submit(job("hold"), idempotency_key="k")


@pytest.mark.promise("G11")
async def test_bad_input_is_refused_before_anything_is_queued(settings: Settings, redis: Redis) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        standing = dump(redis)
        with pytest.raises(UnknownTool) as caught:
            await fleet.submit("ecco")
        assert "echo" in caught.value.details["nearest"]
        assert dump(redis) == standing
        assert (await fleet.core.queue.stats()).messages == 0


@pytest.mark.promise("G11")
async def test_arguments_that_do_not_fit_are_refused_with_the_call(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        with pytest.raises(InvalidArguments) as caught:
            await fleet.submit(("strict", {"x": 1}), ("strict", {"x": "one"}))
        assert caught.value.details["tool_call_id"] == "c2"
        assert (await fleet.core.queue.stats()).messages == 0


@pytest.mark.promise("G11")
async def test_a_full_queue_is_told_from_a_job_that_is_there(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, stream_max_bytes=1 << 20)
    async with open_fleet(settings, workers=0) as fleet:
        big = {"metadata": {"x": "y" * 400_000}}
        ids = [await fleet.submit("echo", **big)]
        kept = await fleet.service.submit(job("echo", **big), idempotency_key="k")
        with pytest.raises(QueueFull):
            await fleet.submit("echo", **big)
        assert not (await fleet.service.submit(job("echo", **big), idempotency_key="k")).created
        async with running_worker(settings, fleet.bench):
            for job_id in (*ids, kept.job_id):
                assert (await fleet.over(job_id)).status is Status.COMPLETED


async def test_the_short_way_gives_the_id_of_a_job(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        tools = [{"tool_name": "echo", "tool_args": {"x": 1}}]
        first = await submit_tool_execution_task({"tools": tools, "metadata": {"a": 1}}, service=fleet.service)
        second = await submit_tool_execution_task(tools, "normal", 0, service=fleet.service)
        assert [(await fleet.over(each)).status for each in (first, second)] == [Status.COMPLETED] * 2
        assert (await fleet.record(first)).task.metadata == {"a": 1}
        assert (await fleet.record(second)).task.max_retries == 0


# -- cancel ----------------------------------------------------------------------------------------------------------


async def test_a_queued_job_is_cancelled_and_its_message_goes(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        receipt = await fleet.service.cancel(job_id)
        assert (receipt.outcome, receipt.reached) == ("cancelled", "queued")
        assert (await fleet.core.queue.stats()).messages == 0
        assert (await fleet.service.cancel(job_id)).outcome == "already_cancelled"
        with pytest.raises(JobNotFound):
            await fleet.service.cancel("job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB")
        with pytest.raises(JobNotFound):
            await fleet.service.cancel(job_id, tenant="other")


async def test_a_job_whose_record_is_not_there_yet_is_cancelled_by_its_message(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = make_task()
        await fleet.core.queue.publish(task)
        assert (await fleet.service.cancel(task.job_id)).outcome == "cancelled"
        assert (await fleet.record(task.job_id)).status is Status.CANCELLED
        assert (await fleet.core.queue.stats()).messages == 0


@pytest.mark.promise("G8")
@pytest.mark.parametrize("tool", ["hold", "once_hold"])
async def test_cancelling_a_running_job_stops_its_tool_and_frees_the_slot(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, tool: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, concurrency=1)
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(tool)
        await fleet.began("c1:1")
        receipt = await fleet.service.cancel(job_id)
        assert (receipt.outcome, receipt.reached, receipt.still_running) == ("cancelled", "tool", [])
        assert fleet.bench.stopped == ["c1"]
        kinds = await fleet.kinds(job_id)
        assert kinds.count("job.cancelling") == 2, "requested, and heard by the worker"
        assert kinds[-1] == "job.cancelled"
        assert (await fleet.over(await fleet.submit("echo"))).status is Status.COMPLETED
        again = await fleet.service.cancel(job_id)
        assert (again.outcome, again.reached) == ("already_cancelled", "tool")
        await fleet.queue_is_empty()


@pytest.mark.promise("G5")
@pytest.mark.promise("G8")
@pytest.mark.parametrize("stopped_by", ["cancel", "timeout"])
async def test_a_call_that_was_stopped_before_it_was_sent_is_not_taken_for_one_that_ran(
    settings: Settings, stopped_by: str
) -> None:
    async with open_fleet(settings) as fleet:
        fleet.bench.session.clear()
        job_id = await fleet.submit("once_echo", timeout_seconds=0.5 if stopped_by == "timeout" else 60)
        await wait_until(lambda: fleet.bench.waiting, "the call waits for a session")
        if stopped_by == "cancel":
            receipt = await fleet.service.cancel(job_id)
            assert (receipt.outcome, receipt.reached) == ("cancelled", "worker")
        ended = await fleet.over(job_id)
        assert ended.status is (Status.CANCELLED if stopped_by == "cancel" else Status.FAILED)
        fleet.bench.session.set()
        await fleet.service.retry(job_id)
        assert (await fleet.over(job_id)).status is Status.COMPLETED
        assert fleet.bench.started == ["c1:2"]
        await fleet.queue_is_empty()


async def test_the_retry_of_a_synchronous_run_is_in_the_queue_at_once(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, retry_delays="0.1")
    async with open_fleet(settings, workers=0, runs_jobs=True) as fleet:
        submission = await fleet.service.submit(job(("fail", {"how": "lost", "times": 1}), mode="sync"))
        assert submission.record is not None
        assert (submission.record.status, submission.ran) == (Status.QUEUED, False)
        assert await fleet.core.queue.stands(submission.job_id)
        async with running_worker(settings, fleet.bench):
            assert (await fleet.over(submission.job_id)).status is Status.COMPLETED
        await fleet.queue_is_empty()


@pytest.mark.promise("G8")
async def test_a_cancel_that_pubsub_drops_comes_with_the_renewal(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, lease=0.9, ack_wait=5)
    async with open_fleet(settings) as fleet:
        fleet.workers[0]._keeper.cancel = lambda _: None  # type: ignore[method-assign]
        job_id = await fleet.submit("hold")
        await fleet.began("c1:1")
        # By the store alone: nothing is published that the worker could hear.
        await fleet.core.client.hset(_record_key(job_id), "cancel", '{"status":"cancelled"}')
        record = await fleet.over(job_id)
        assert (record.status, fleet.bench.stopped) == (Status.CANCELLED, ["c1"])


@pytest.mark.promise("G8")
async def test_a_tool_that_does_not_stop_is_reported_as_running(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, concurrency=1)
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("stubborn")
        await fleet.began("c1:1")
        receipt = await fleet.service.cancel(job_id)
        assert (receipt.outcome, receipt.reached) == ("cancelled", "tool")
        assert states(receipt) == {"c1": CallStop.TOLD}
        assert receipt.still_running == ["c1"]
        last = (await fleet.log(job_id))[-1]
        assert (last.data["still_running"], last.data["tool_stopped"]) == (["c1"], "not_confirmed")
        assert (await fleet.over(await fleet.submit("echo"))).status is Status.COMPLETED
        again = await fleet.service.cancel(job_id)
        assert (again.outcome, states(again)) == ("already_cancelled", states(receipt))
        fleet.bench.gate.set()


@pytest.mark.promise("G8")
async def test_a_cancel_tells_of_every_call_how_far_it_got(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, calls_at_once=2)
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo", "hold", "once_hold", "hold")
        await fleet.began("c2:1")
        await fleet.began("c3:1")
        receipt = await fleet.service.cancel(job_id)
        assert (receipt.outcome, receipt.reached, receipt.still_running) == ("cancelled", "tool", [])
        expected = ["ended", "stopped", "stopped", "not_sent"]
        assert [call.state for call in receipt.calls] == expected
        assert [call.tool_name for call in receipt.calls] == ["echo", "hold", "once_hold", "hold"]
        last = (await fleet.log(job_id))[-1].data
        assert [call["state"] for call in last["calls"]] == expected


@pytest.mark.promise("G8")
async def test_a_job_that_waits_for_its_next_attempt_tells_what_the_last_one_left(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, retry_delays="600")
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo", ("fail", {"how": "lost"}))
        await wait_until(lambda: _retries(fleet, job_id), "it waits for its second attempt")
        receipt = await fleet.service.cancel(job_id)
        assert (receipt.outcome, receipt.reached) == ("cancelled", "queued")
        assert states(receipt) == {"c1": CallStop.ENDED, "c2": CallStop.NOT_SENT}
        assert (await fleet.log(job_id))[-1].data["calls"][0]["tool_name"] == "echo"


@pytest.mark.promise("G8")
async def test_a_worker_that_says_nothing_leaves_its_calls_in_doubt(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id, store = await fleet.submit("echo", "hold"), fleet.core.store
        task = (await fleet.record(job_id)).task
        granted = await store.claim(task, token="t", worker="gone", lease_ms=LEASE_MS, published_at=None)
        assert isinstance(granted, Granted)
        lease = Lease(job_id, granted.fence)
        await store.progress(lease, told("c1"), 1)
        receipt = await fleet.service.cancel(job_id)
        assert (receipt.outcome, receipt.reached, receipt.worker) == ("cancelling", "requested", "gone")
        assert states(receipt) == {"c1": CallStop.ENDED, "c2": CallStop.NOT_TOLD}
        assert receipt.still_running == ["c2"]
        # Its lease ends, and with the next attempt's claim the job.
        await fleet.core.client.hset(_record_key(job_id), "lease_until", "1")
        async with running_worker(settings, fleet.bench):
            assert (await fleet.over(job_id)).status is Status.CANCELLED
        later = await fleet.service.cancel(job_id)
        assert (later.outcome, later.reached, states(later)) == ("already_cancelled", "requested", states(receipt))
        await fleet.queue_is_empty()


def states(receipt: CancelReceipt) -> dict[str, CallStop]:
    return {call.tool_call_id: call.state for call in receipt.calls}


async def _retries(fleet: Fleet, job_id: str) -> int:
    return (await fleet.record(job_id)).retries


async def test_a_job_that_ended_otherwise_can_not_be_cancelled(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo")
        await fleet.over(job_id)
        receipt = await fleet.service.cancel(job_id)
        assert (receipt.outcome, receipt.status) == ("ended", Status.COMPLETED)


@pytest.mark.promise("G6")
@pytest.mark.promise("G11")
async def test_a_job_that_could_never_start_is_refused_unless_it_is_there_already(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        for fields in (
            {"expires_at": "2020-01-01T00:00:00Z"},
            {"expires_at": iso_time(int(time.time() * 1000) + 60_000), "delay_seconds": 3600},
        ):
            with pytest.raises(InvalidTask, match="could never start"):
                await fleet.submit("echo", **fields)
        new = job("echo", expires_at="2030-01-01T00:00:00Z")
        first = await fleet.service.submit(new, idempotency_key="one")
        fleet.service._submitter._clock = lambda: 4e9
        # The same key asks for a job that was accepted in time.
        assert (await fleet.service.submit(new, idempotency_key="one")).job_id == first.job_id
        with pytest.raises(InvalidTask, match="over already"):
            await fleet.service.submit(new, idempotency_key="two")
        await fleet.service.cancel(first.job_id)


# -- retry and resolve -----------------------------------------------------------------------------------------------


async def test_a_failed_job_is_retried_with_what_it_has(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo", ("fail", {"how": "rejected", "times": 1}))
        assert (await fleet.over(job_id)).status is Status.FAILED
        view = await fleet.service.retry(job_id)
        assert view.record is not None
        record = await fleet.over(job_id)
        assert (record.status, record.generation, record.error) == (Status.COMPLETED, 2, None)
        assert sorted(fleet.bench.started) == ["c1:1", "c2:1", "c2:2"]
        with pytest.raises(IllegalMove):
            await fleet.service.retry(job_id)
        await fleet.queue_is_empty()


@pytest.mark.promise("G5")
async def test_a_persons_word_decides_each_call_once(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(("once_fail", {"how": "lost"}), ("once_fail", {"how": "lost"}))
        assert (await fleet.over(job_id)).undecided == ("c1", "c2")
        with pytest.raises(IllegalMove):
            await fleet.service.retry(job_id)
        with pytest.raises(JobNotFound):
            await fleet.service.resolve(job_id, "c9", "failed")
        view = await fleet.service.resolve(job_id, "c1", "completed", result={"sent": True}, note="seen", by="alice")
        assert view.record is not None
        assert (view.record.status, view.record.undecided) == (Status.UNKNOWN, ("c2",))
        (told,) = view.record.decisions
        assert (told.tool_call_id, told.decision, told.by, told.note) == ("c1", "completed", "alice", "seen")
        before = len(await fleet.log(job_id))
        with pytest.raises(IllegalMove, match="decided already"):
            await fleet.service.resolve(job_id, "c1", "failed")
        view = await fleet.service.resolve(job_id, "c2", "failed", note="it bounced", by="bob")
        assert view.record is not None
        assert view.record.decisions == ()
        opened = (await fleet.log(job_id))[before]
        assert (opened.type.value, opened.generation, opened.data["reason"]) == ("job.queued", 2, "resolved")
        decisions = opened.data["decisions"]
        assert isinstance(decisions, list)
        assert [{**one, "decided_at": "then"} for one in decisions if isinstance(one, dict)] == [
            {"tool_call_id": "c1", "decision": "completed", "by": "alice", "note": "seen", "decided_at": "then"},
            {"tool_call_id": "c2", "decision": "failed", "by": "bob", "note": "it bounced", "decided_at": "then"},
        ]
        assert (view.record.status, view.record.completed_calls, view.record.failed_calls) == (Status.FAILED, 1, 1)
        results = await fleet.service.results(view.record)
        assert results["c1"].structured_content == {"sent": True}
        assert len(fleet.bench.started) == 2


# -- watch -----------------------------------------------------------------------------------------------------------


async def collect(items: AsyncGenerator[StreamItem, None]) -> list[StreamItem]:
    async with asyncio.timeout(15):
        return [item async for item in items]


def ids_of(items: list[StreamItem]) -> list[int]:
    return [item.id for item in items if isinstance(item, JobEvent)]


@pytest.mark.promise("G7")
async def test_readers_see_the_rest_of_the_log_from_wherever_they_were(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("hold")
        live = asyncio.create_task(collect(fleet.service.events(job_id, heartbeat_s=60)))
        await fleet.began("c1:1")
        fleet.bench.gate.set()
        everything = ids_of(await live)
        assert everything == list(range(1, len(await fleet.log(job_id)) + 1))
        for after in range(len(everything) + 1):
            assert ids_of(await collect(fleet.service.events(job_id, after=after))) == everything[after:]


@pytest.mark.promise("G7")
async def test_the_last_event_is_seen_although_its_push_was_lost(settings: Settings, redis: Redis) -> None:
    async with open_fleet(settings, workers=2) as fleet:
        for _ in range(3):
            job_id = await fleet.submit("hold")
            reader = asyncio.create_task(collect(fleet.service.events(job_id, heartbeat_s=60)))
            await wait_until(lambda: "c1:1" in fleet.bench.started, "the call has begun")
            await _subscribed(fleet, redis, job_id)
            # Between the death of the connection and its next life everything is published that there is.
            redis.client_kill_filter(_type="pubsub")
            fleet.bench.gate.set()
            assert ids_of(await reader) == list(range(1, len(await fleet.log(job_id)) + 1))
            fleet.bench.gate.clear()
            fleet.bench.started.clear()


async def _subscribed(fleet: Fleet, redis: Redis, job_id: str) -> None:
    key = _record_key(job_id).replace(":job:", ":ev:")
    await wait_until(lambda: dict(redis.pubsub_numsub(key)).get(key), "the reader has subscribed")


@pytest.mark.promise("G7")
async def test_what_was_trimmed_from_the_log_is_told(settings: Settings) -> None:
    async with open_fleet(settings.model_copy(update={"event_log_max": 5})) as fleet:
        job_id = await fleet.submit(("fail", {"how": "lost"}), max_retries=5)
        record = await fleet.over(job_id)
        first, *rest = await collect(fleet.service.events(job_id, after=3))
        assert isinstance(first, Gap)
        assert first.after == 3
        assert first.resumes_at > 4
        assert ids_of(rest) == list(range(first.resumes_at, record.last_event + 1))


async def test_an_id_from_nowhere_does_not_hide_the_end(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("hold")
        await fleet.began("c1:1")
        reader = asyncio.create_task(collect(fleet.service.events(job_id, after=10_000)))
        fleet.bench.gate.set()
        assert (await fleet.over(job_id)).status is Status.COMPLETED
        last = (await reader)[-1]
        assert isinstance(last, JobEvent)
        assert last.ends_stream


async def test_a_stream_is_of_the_generation_it_was_opened_on(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(("fail", {"how": "rejected", "times": 1}))
        await fleet.over(job_id)
        await fleet.service.retry(job_id)
        items = [i for i in await collect(fleet.service.events(job_id)) if isinstance(i, JobEvent)]
        ends = [(item.type.value, item.generation) for item in items if item.ends_stream]
        assert ends == [("job.failed", 1), ("job.completed", 2)]


async def test_waiting_ends_with_a_change(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        waiting = asyncio.create_task(fleet.service.wait(job_id, 60))
        async with running_worker(settings, fleet.bench), asyncio.timeout(10):
            view = await waiting
            assert view.record is not None
            assert view.record.last_event > 1
            await fleet.over(job_id)
        assert (await fleet.service.wait(job_id, 60)).record == await fleet.record(job_id)


async def test_jobs_of_others_are_not_there(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo")
        await fleet.over(job_id)
        for call in (fleet.service.get, fleet.service.retry, fleet.service.cancel):
            with pytest.raises(JobNotFound):
                await call(job_id, tenant="other")
        with pytest.raises(JobNotFound):
            await collect(fleet.service.events(job_id, tenant="other"))


def _record_key(job_id: str) -> str:
    return f"{root_of(job_id)}:job:{job_id}"
