"""Jobs through real servers: what runs, what is retried, what is told, what remains."""

from __future__ import annotations

from typing import Any

import pytest

from tests.background_jobs.harness import open_fleet, running_worker
from tests.background_jobs.making import make_task, told
from tests.conftest import SettingsFactory
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.ports import Granted, Lease
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.task_models import Status
from toolfleet.settings import Settings


async def test_a_job_is_told_from_its_beginning_to_its_end(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(("echo", {"x": 1}))
        record = await fleet.over(job_id)
        assert (record.status, record.starts, record.completed_calls, record.percent) == (Status.COMPLETED, 1, 1, 100)
        assert await fleet.kinds(job_id) == [
            "job.queued", "job.started", "tool.started", "tool.completed", "job.completed",
        ]  # fmt: skip
        assert [event.attempt for event in await fleet.log(job_id)] == [0, 1, 1, 1, 1]
        results = await fleet.service.results(record)
        assert results["c1"].structured_content == {"x": 1}
        await fleet.queue_is_empty()


async def test_calls_run_side_by_side_up_to_the_limit(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, calls_at_once=2)
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("hold", "hold", "hold", "hold", "hold")
        await wait_until(lambda: fleet.bench.at_once == 2, "two calls run")
        fleet.bench.gate.set()
        record = await fleet.over(job_id)
        assert (record.status, fleet.bench.most_at_once) == (Status.COMPLETED, 2)


async def test_progress_of_a_tool_is_told_while_it_runs(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("hold", "echo")

        async def told() -> bool:
            return "tool.progress" in await fleet.kinds(job_id)

        await wait_until(told, "the progress is told")
        record = await fleet.record(job_id)
        assert (record.current_tool, record.percent, record.message) == ("hold", 75, "holding")
        (progress,) = [event for event in await fleet.log(job_id) if event.type == "tool.progress"]
        assert progress.data == {
            "tool_call_id": "c1", "tool_name": "hold", "progress": 1.0, "total": 2.0, "message": "holding",
        }  # fmt: skip
        fleet.bench.gate.set()
        await fleet.over(job_id)


@pytest.mark.promise("G4")
async def test_a_retry_runs_only_what_has_no_result(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo", ("fail", {"how": "server", "times": 1}), "once_echo")
        record = await fleet.over(job_id)
        assert (record.status, record.retries, record.starts) == (Status.COMPLETED, 1, 2)
        assert sorted(fleet.bench.started) == ["c1:1", "c2:1", "c2:2", "c3:1"]
        failed = next(event for event in await fleet.log(job_id) if event.type == "tool.failed")
        assert failed.data["will_retry"] is True
        retrying = next(event for event in await fleet.log(job_id) if event.type == "job.retrying")
        assert (retrying.data["retry"], "next_attempt_at" in retrying.data) == (1, True)


async def test_retries_end(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(("fail", {"how": "lost"}), max_retries=2)
        record = await fleet.over(job_id)
        assert (record.status, record.retries, len(fleet.bench.started)) == (Status.FAILED, 2, 3)
        assert record.error is not None
        assert record.error.code == "connection_lost"
        failed = [event.data["will_retry"] for event in await fleet.log(job_id) if event.type == "tool.failed"]
        assert failed == [True, True, False]


@pytest.mark.parametrize(
    ("tool", "args"),
    [("complain", {}), ("once_complain", {}), ("fail", {"how": "rejected"}), ("once_fail", {"how": "server"})],
)
async def test_an_answer_is_an_answer_and_not_retried(settings: Settings, tool: str, args: dict[str, Any]) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit((tool, args))
        record = await fleet.over(job_id)
        assert (record.status, record.retries, fleet.bench.started) == (Status.FAILED, 0, ["c1:1"])
        assert (await fleet.service.results(record))["c1"].status == "failed"


@pytest.mark.promise("G5")
async def test_a_call_that_must_not_run_twice_is_retried_where_it_was_surely_not_sent(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(("once_fail", {"how": "unsent", "times": 1}))
        record = await fleet.over(job_id)
        assert (record.status, record.retries) == (Status.COMPLETED, 1)


@pytest.mark.promise("G5")
async def test_a_call_that_must_not_run_twice_and_was_cut_off_waits_for_a_person(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(("once_fail", {"how": "lost", "times": 1}), ("fail", {"how": "lost", "times": 1}))
        record = await fleet.over(job_id)
        assert (record.status, record.undecided, record.retries) == (Status.UNKNOWN, ("c1",), 1)
        assert sorted(fleet.bench.started) == ["c1:1", "c2:1", "c2:2"], "the other call ends first"
        started = [event for event in await fleet.log(job_id) if event.type == "tool.started"]
        assert [event.data.get("runs_once") for event in started if event.data["tool_call_id"] == "c1"] == [True]
        await fleet.queue_is_empty()
        view = await fleet.service.resolve(job_id, "c1", "rerun")
        assert view.record is not None
        record = await fleet.over(job_id)
        assert (record.status, record.generation) == (Status.COMPLETED, 2)
        assert fleet.bench.started[-1] == "c1:3"
        await fleet.queue_is_empty()


@pytest.mark.parametrize("tool", ["hold", "once_hold"])
async def test_a_call_that_takes_too_long(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, tool: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, call_timeout=0.1)
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit(tool, max_retries=1)
        record = await fleet.over(job_id)
        assert record.error is not None
        if tool == "hold":
            assert (record.status, record.error.code, record.retries) == (Status.FAILED, "timeout", 1)
        else:
            assert (record.status, record.error.code, record.retries) == (Status.UNKNOWN, "outcome_unknown", 0)


@pytest.mark.parametrize(("tool", "status"), [("hold", Status.FAILED), ("once_hold", Status.UNKNOWN)])
async def test_a_job_that_takes_too_long_keeps_what_it_has(settings: Settings, tool: str, status: Status) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo", tool, timeout_seconds=0.2)
        record = await fleet.over(job_id)
        assert record.status is status
        assert fleet.bench.stopped == ["c2"]
        assert set(await fleet.service.results(record)) == {"c1"}
        if status is Status.FAILED:
            assert record.error is not None
            assert (record.error.code, record.error.tool_call_id) == ("timeout", "c2")
        await fleet.queue_is_empty()


async def test_a_tool_that_nobody_has_fails_its_call(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        task = make_task(tool="nothing_like_it")
        await fleet.core.queue.publish(task)
        record = await fleet.reaches(task.job_id, Status.FAILED)
        assert record.error is not None
        assert (record.error.code, record.retries) == ("unknown_tool", 0)


async def test_a_result_above_the_limit_fails_its_call_and_says_so(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        fleet.workers[0]._executor._runner._max_result_bytes = 500  # type: ignore[attr-defined]
        job_id = await fleet.submit(("echo", {"x": "y" * 1000}), "echo")
        record = await fleet.over(job_id)
        assert (record.status, record.completed_calls, record.failed_calls) == (Status.FAILED, 1, 1)
        error = (await fleet.service.results(record))["c1"].error
        assert error is not None
        assert error.code == "result_too_large"


async def test_a_delayed_job_waits_for_its_time(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("echo", delay_seconds=0.4)
        record = await fleet.over(job_id)
        assert record.status is Status.COMPLETED
        assert record.started_at is not None
        assert record.started_at - record.created_at >= 400, "by the clock of the Redis server"
        assert record.starts == 1


async def test_a_job_nobody_started_in_time_fails_as_expired(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        # Accepted when its time was not over yet, and delivered when it is.
        task = make_task(expires_at=1)
        await fleet.core.queue.publish(task)
        record = await fleet.over(task.job_id)
        assert record.error is not None
        assert (record.error.code, fleet.bench.started) == ("expired", [])
        await fleet.queue_is_empty()


@pytest.mark.promise("G9")
async def test_a_job_with_a_large_task_can_be_buried(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("echo", metadata={"x": "y" * 880_000})
        root = f"{root_of(job_id)}:job:{job_id}"
        await fleet.core.client.hset(root, "starts", 99)
        async with running_worker(settings, fleet.bench):
            record = await fleet.over(job_id)
        assert record.error is not None
        assert (record.status, record.error.code, fleet.bench.started) == (Status.FAILED, "too_many_starts", [])
        page = await fleet.core.letters.page(0, 10)
        (letter,) = page.entries
        assert (letter.job_id, letter.reason, letter.fence) == (job_id, "too_many_starts", 1)
        assert letter.payload == record.task.to_json()


@pytest.mark.promise("G4")
@pytest.mark.parametrize(("last", "status"), [("completed", Status.COMPLETED), ("failed", Status.FAILED)])
async def test_a_job_whose_calls_all_have_results_ends_without_running_any(
    settings: Settings, last: Any, status: Status
) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task, store = make_task(2), fleet.core.store
        answer = await store.claim(task, token="t", worker="dead", lease_ms=60_000, published_at=None)
        assert isinstance(answer, Granted)
        lease = Lease(task.job_id, answer.fence)
        await store.progress(lease, told("c1"), 1)
        await store.progress(lease, told("c2", status=last), 2)
        await fleet.core.client.hset(f"{root_of(task.job_id)}:job:{task.job_id}", "lease_until", "1")
        await fleet.core.queue.publish(task)
        async with running_worker(settings, fleet.bench):
            record = await fleet.over(task.job_id)
        assert (record.status, record.starts, fleet.bench.started) == (status, 2, [])
        assert record.completed_calls + record.failed_calls == 2


@pytest.mark.promise("G8")
@pytest.mark.parametrize("tool", ["hold", "once_hold"])
async def test_a_job_is_cancelled_while_its_tool_is_looked_up(settings: Settings, tool: str) -> None:
    async with open_fleet(settings) as fleet:
        fleet.bench.lookup.clear()
        job_id = await fleet.submit(tool)
        await wait_until(lambda: fleet.bench.looking, "the tool is looked up")
        receipt = await fleet.service.cancel(job_id)
        assert (receipt.outcome, receipt.reached) == ("cancelled", "worker")
        assert fleet.bench.started == []
        assert (await fleet.log(job_id))[-1].data["tool_stopped"] == "nothing_was_running"


@pytest.mark.promise("G10")
async def test_a_worker_that_leaves_hands_back_what_it_never_began(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, drain_timeout=0.2)
    async with open_fleet(settings, workers=0) as fleet:
        fleet.bench.lookup.clear()
        job_id = await fleet.submit("once_echo")
        async with running_worker(settings, fleet.bench):
            await wait_until(lambda: fleet.bench.looking, "the tool is looked up")
        record = await fleet.record(job_id)
        assert (record.status, record.starts, record.last_event) == (Status.QUEUED, 0, 3)
        fleet.bench.lookup.set()
        async with running_worker(settings, fleet.bench):
            assert (await fleet.over(job_id)).status is Status.COMPLETED
        assert fleet.bench.started == ["c1:2"]
