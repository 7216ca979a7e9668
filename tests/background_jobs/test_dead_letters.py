"""Dead letters: redriven with all they have, once; crashes between the steps; records that are gone; many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from redis import Redis

from tests.background_jobs.dumping import check_job
from tests.background_jobs.harness import Fleet, open_fleet, running_worker
from tests.background_jobs.making import LEASE_MS, make_task, result
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.dead_letter_values import LetterFilter
from toolfleet.services.background_jobs.errors import DeadLetterNotFound, IllegalMove, QueueUnavailable
from toolfleet.services.background_jobs.ports import Changes, Granted, Lease
from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.task_models import Status, TaskDefinition, Tier
from toolfleet.settings import Settings

STARTS = 3
"""Of a job before it is a dead letter, by the settings."""


async def die(fleet: Fleet, task: TaskDefinition, *, results: Sequence[str] = ()) -> None:
    """As a worker that is killed while it runs the job: a claim, what it has stored, and no more."""
    answer = await fleet.core.store.claim(task, token="dead", worker="killed", lease_ms=LEASE_MS, published_at=None)
    assert isinstance(answer, Granted)
    if results:
        changes = Changes(results=tuple(result(call) for call in results))
        assert await fleet.core.store.progress(Lease(task.job_id, answer.fence), changes, 1) == "ok"
    # Its lease runs out.
    await fleet.core.client.hset(f"{root_of(task.job_id)}:job:{task.job_id}", "lease_until", 1)
    await fleet.core.client.hset(f"{root_of(task.job_id)}:job:{task.job_id}", "token", "")


async def dead_job(fleet: Fleet, *tools: str) -> TaskDefinition:
    """A job that killed its workers: its first call has a result, and a worker has made it a dead letter."""
    job_id = await fleet.submit(*(tools or ("echo", "hold")))
    task = (await fleet.record(job_id)).task
    for number in range(STARTS):
        await die(fleet, task, results=() if number else ("c1",))
    async with running_worker(fleet.settings, fleet.bench):
        record = await fleet.over(job_id)
        await fleet.queue_is_empty()
    assert record.error is not None
    assert (record.status, record.error.code) == (Status.FAILED, "too_many_starts")
    assert fleet.bench.started == []
    return task


async def letters_of(fleet: Fleet) -> list[DeadLetter]:
    return list((await fleet.core.letters.page(0, 100)).entries)


@pytest.mark.promise("G4")
@pytest.mark.promise("G9")
async def test_a_redriven_job_keeps_its_id_its_log_and_its_results(settings: Settings, redis: Redis) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)
        before = await fleet.log(task.job_id)
        answer = await fleet.service.letters.redrive(task.job_id, by="alice", note="its server is up again")
        assert answer.generation == 2
        assert await letters_of(fleet) == []
        check_job(redis, task.job_id)
        async with running_worker(settings, fleet.bench):
            fleet.bench.gate.set()
            record = await fleet.over(task.job_id)
            await fleet.queue_is_empty()
        assert (record.status, record.generation, record.completed_calls) == (Status.COMPLETED, 2, 2)
        # The first call has kept its result: only the second one ran.
        assert fleet.bench.started == [f"c2:{STARTS + 2}"]
        log = await fleet.log(task.job_id)
        assert log[: len(before)] == before
        opened = log[len(before)]
        assert (opened.type.value, opened.generation) == ("job.queued", 2)
        assert opened.data == {"reason": "redrive", "by": "alice", "note": "its server is up again"}


@pytest.mark.promise("G9")
async def test_a_job_that_dies_again_has_a_letter_of_its_own_again(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)
        (first,) = await letters_of(fleet)
        await fleet.service.letters.redrive(task.job_id)
        again = task.model_copy(update={"generation": 2})
        for _ in range(STARTS):
            await die(fleet, again)
        async with running_worker(settings, fleet.bench):
            assert (await fleet.over(task.job_id)).generation == 2
        (second,) = await letters_of(fleet)
        assert second.fence > first.fence
        found = second.task()
        assert found is not None
        assert found.generation == 2
        await fleet.service.letters.redrive(task.job_id)
        async with running_worker(settings, fleet.bench):
            fleet.bench.gate.set()
            assert (await fleet.over(task.job_id)).status is Status.COMPLETED


@pytest.mark.promise("G3")
async def test_of_many_redrives_at_once_one_wins(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)
        answers = await asyncio.gather(
            *(fleet.service.letters.redrive(task.job_id) for _ in range(10)), return_exceptions=True
        )
        won = [answer for answer in answers if not isinstance(answer, BaseException)]
        lost = [answer for answer in answers if isinstance(answer, BaseException)]
        assert len(won) == 1
        # Who looks after the letters are gone finds none.
        assert all(isinstance(error, (IllegalMove, DeadLetterNotFound)) for error in lost), lost
        async with running_worker(settings, fleet.bench):
            fleet.bench.gate.set()
            assert (await fleet.over(task.job_id)).generation == 2
            await fleet.queue_is_empty()
        assert len(fleet.bench.started) == 1


async def test_the_loser_is_told_what_happened(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)
        (letter,) = await letters_of(fleet)
        await fleet.core.store.redrive(task, letter.fence, 60_000, "", "")
        with pytest.raises(IllegalMove, match=r"generation 2 is queued.*nothing was run") as caught:
            await fleet.service.letters.redrive(task.job_id)
        assert caught.value.details["status"] == "queued"
        # It has made up for what the first one left undone.
        assert await letters_of(fleet) == []
        with pytest.raises(DeadLetterNotFound):
            await fleet.service.letters.redrive(task.job_id)
        await fleet.service.cancel(task.job_id)


# -- crashes between the steps -----------------------------------------------------------------------------------------


@pytest.mark.promise("G1")
async def test_what_dies_after_the_first_step_is_published_by_the_reconciler(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)
        (letter,) = await letters_of(fleet)
        await fleet.core.store.redrive(task, letter.fence, 60_000, "", "")
        await fleet.core.client.zadd(f"{root_of(task.job_id)}:due", {task.job_id: 1})
        async with running_worker(settings, fleet.bench) as worker:
            await worker._reconciler.look()
            fleet.bench.gate.set()
            assert (await fleet.over(task.job_id)).status is Status.COMPLETED
            await fleet.queue_is_empty()
        assert fleet.bench.started == [f"c2:{STARTS + 2}"]


@pytest.mark.promise("G4")
async def test_a_letter_that_was_left_behind_runs_nothing_even_when_the_record_is_gone(
    settings: Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)
        with monkeypatch.context() as patched:
            patched.setattr(fleet.core.letters, "remove", _down)
            await fleet.service.letters.redrive(task.job_id)
        assert len(await letters_of(fleet)) == 1
        async with running_worker(settings, fleet.bench):
            fleet.bench.gate.set()
            assert (await fleet.over(task.job_id)).status is Status.COMPLETED
        # A day later.
        _forget(redis, task.job_id)
        with pytest.raises(IllegalMove, match="its record has expired"):
            await fleet.service.letters.redrive(task.job_id)
        assert await letters_of(fleet) == []
        assert not await fleet.core.queue.stands(task.job_id)
        assert len(fleet.bench.started) == 1


async def _down(*_: object) -> bool:
    raise QueueUnavailable("gone between the steps")


@pytest.mark.promise("G2")
async def test_where_the_record_is_gone_the_letter_makes_it_again(settings: Settings, redis: Redis) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)
        (letter,) = await letters_of(fleet)
        _forget(redis, task.job_id)
        history = await fleet.service.letters.show(task.job_id)
        assert (history.record, history.events, dict(history.results)) == (None, [], {})
        answer = await fleet.service.letters.redrive(task.job_id, by="alice")
        record = await fleet.record(task.job_id)
        assert (answer.generation, record.generation, record.fence) == (2, 2, letter.fence)
        (opened,) = await fleet.log(task.job_id)
        assert opened.data == {"reason": "redrive", "by": "alice"}
        check_job(redis, task.job_id)
        # An attempt of the life before: its message is answered with 'over', its writes are refused.
        stale = await fleet.core.store.claim(task, token="t", worker="w", lease_ms=1000, published_at=None)
        assert not isinstance(stale, Granted)
        async with running_worker(settings, fleet.bench):
            fleet.bench.gate.set()
            ended = await fleet.over(task.job_id)
            await fleet.queue_is_empty()
        assert (ended.status, ended.fence) == (Status.COMPLETED, letter.fence + 1)
        check_job(redis, task.job_id)


def _forget(redis: Redis, job_id: str) -> None:
    """As when the record's time is up and the indexes were pruned."""
    root = root_of(job_id)
    for kind in ("job", "log", "res"):
        redis.delete(f"{root}:{kind}:{job_id}")
    for tier in Tier:
        for status in Status:
            redis.zrem(f"{root}:ix:{tier}:{status}", job_id)
            redis.zrem(f"{root}:expiry", f"{tier}:{status}:{job_id}")


async def test_a_queue_that_is_down_leaves_the_publish_to_the_reconciler(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)

        with monkeypatch.context() as patched:
            patched.setattr(fleet.core.queue, "purge", _down)
            await fleet.service.letters.redrive(task.job_id)
        assert (await fleet.record(task.job_id)).status is Status.QUEUED
        assert not await fleet.core.queue.stands(task.job_id)
        await fleet.service.cancel(task.job_id)


# -- what may not be redriven ------------------------------------------------------------------------------------------


async def test_a_job_that_goes_on_or_has_ended_otherwise_is_left_alone(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        task = (await fleet.record(job_id)).task
        letter = DeadLetter(job_id, 1, "too_many_starts", "told too early", task.to_json())
        await fleet.core.letters.store(letter)
        with pytest.raises(IllegalMove, match="is queued"):
            await fleet.service.letters.redrive(job_id)
        async with running_worker(settings, fleet.bench):
            await fleet.over(job_id)
        with pytest.raises(IllegalMove, match="is completed"):
            await fleet.service.letters.redrive(job_id)
        assert await fleet.service.letters.discard(job_id) == 1
        with pytest.raises(DeadLetterNotFound):
            await fleet.service.letters.discard(job_id)
        assert (await fleet.record(job_id)).status is Status.COMPLETED
        assert fleet.bench.started == ["c1:1"]


async def test_a_malformed_message_is_shown_raw_and_can_only_be_discarded(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        subject = fleet.core.queue.names.subject(Tier.NORMAL, "job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB")
        await fleet.core.connection.request(subject, b"\xff\x00 nonsense", 5)

        async def buried() -> list[DeadLetter]:
            return await letters_of(fleet)

        await wait_until(buried, "the message is a dead letter")
        (letter,) = await buried()
        assert (letter.malformed, letter.subject, letter.payload) == (True, subject, b"\xff\x00 nonsense")
        assert letter.letter_id == "letter_1"
        with pytest.raises(IllegalMove, match=r"is no job.*discard"):
            await fleet.service.letters.redrive("letter_1")
        with pytest.raises(DeadLetterNotFound):
            await fleet.service.letters.show("job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB")
        with pytest.raises(DeadLetterNotFound):
            await fleet.service.letters.discard("letter_1", tenant="other")
        assert await fleet.service.letters.discard("letter_1") == 1
        await fleet.queue_is_empty()


async def test_letters_of_others_are_not_there(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = make_task(tenant="other")
        await fleet.core.letters.store(DeadLetter(task.job_id, 1, "stale", "old", task.to_json()))
        assert (await fleet.service.letters.page(LetterFilter(), 0, 10)).letters == []
        with pytest.raises(DeadLetterNotFound):
            await fleet.service.letters.redrive(task.job_id)
        assert len((await fleet.service.letters.page(LetterFilter(), 0, 10, "other")).letters) == 1


async def test_retrying_a_dead_job_takes_its_letters_away_too(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        task = await dead_job(fleet)
        await fleet.service.retry(task.job_id)
        assert await letters_of(fleet) == []
        await fleet.service.cancel(task.job_id)


# -- many --------------------------------------------------------------------------------------------------------------


async def test_many_are_redriven_by_a_filter_and_the_others_are_named(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        service = fleet.service.letters
        tasks = [make_task(tool="echo" if number < 4 else "hold") for number in range(6)]
        for task in tasks:
            await fleet.core.letters.store(DeadLetter(task.job_id, 3, "too_many_starts", "died", task.to_json()))
        await fleet.core.letters.store(DeadLetter(None, 0, "malformed", "not a task", b"{}"))
        goes_on = await fleet.submit("echo")
        again = (await fleet.record(goes_on)).task
        await fleet.core.letters.store(DeadLetter(goes_on, 1, "stale", "old", again.to_json()))

        echoes = LetterFilter(tool_name="echo")
        plan = await service.redrive_many(echoes, limit=3, dry_run=True)
        assert (list(plan.matched), plan.done) == ([task.job_id for task in tasks[:3]], ())
        assert len(await letters_of(fleet)) == 8
        first = await service.redrive_many(echoes, limit=3)
        assert sorted(first.done) == sorted(plan.matched)
        rest = await service.redrive_many(echoes, limit=10, after=first.cursor or 0)
        assert (rest.done, rest.cursor) == ([tasks[3].job_id], None)
        assert [(one.letter_id, "is queued" in one.why) for one in rest.refused] == [(goes_on, True)]

        bad = await service.redrive_many(LetterFilter(reason="malformed"), limit=10)
        assert (bad.done, len(bad.refused)) == ([], 1)
        everything = await service.redrive_many(LetterFilter(), limit=10, dry_run=True)
        assert sorted(everything.matched) == sorted([goes_on, tasks[4].job_id, tasks[5].job_id])
        moment = (await letters_of(fleet))[0].at
        assert (await service.redrive_many(LetterFilter(older_than=moment), limit=10, dry_run=True)).matched == []
        newer = LetterFilter(newer_than=moment - 1, reason="too_many_starts")
        gone = await service.discard_many(newer, limit=10)
        assert sorted(gone.done) == sorted([tasks[4].job_id, tasks[5].job_id])
        assert [letter.reason for letter in await letters_of(fleet)] == ["malformed", "stale"]
        async with running_worker(settings, fleet.bench):
            for task in tasks[:4]:
                assert (await fleet.over(task.job_id)).status is Status.COMPLETED
            await fleet.over(goes_on)
            await fleet.queue_is_empty()
