"""Messages that are no tasks, or not for this worker (G11)."""

from __future__ import annotations

import json

import pytest
from redis import Redis

from tests.background_jobs.dumping import dump
from tests.background_jobs.harness import Fleet, open_fleet
from tests.background_jobs.making import make_task
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.task_models import Status, Tier, new_job_id
from toolfleet.settings import Settings


async def send(fleet: Fleet, last: str, data: bytes) -> None:
    subject = f"{fleet.core.queue.names.prefix}.{Tier.NORMAL}.{last}"
    reply = await fleet.core.connection.request(subject, data, 5)
    assert "error" not in json.loads(reply.data)


async def the_letter(fleet: Fleet) -> DeadLetter:
    async def letters() -> list[DeadLetter]:
        return list((await fleet.core.letters.page(0, 10)).entries)

    (letter,) = await wait_until(letters, "the message is buried")
    await fleet.queue_is_empty()
    return letter


@pytest.mark.promise("G11")
@pytest.mark.parametrize(
    "data", [b"", b"nonsense", b"\xff\x00", b'{"v": 1}', b"[" * 50_000, b'{"v":1,"tools":"' + b"x" * 1_000_000]
)
async def test_a_malformed_message_becomes_a_dead_letter(settings: Settings, redis: Redis, data: bytes) -> None:
    async with open_fleet(settings) as fleet:
        before = {key for key in dump(redis) if ":job:" in key}
        job_id = new_job_id()
        await send(fleet, job_id, data)
        letter = await the_letter(fleet)
        assert (letter.job_id, letter.reason) == (job_id, "malformed")
        assert letter.payload == data[: len(letter.payload)]
        assert len(letter.payload) >= min(len(data), 900 * 1024)
        assert {key for key in dump(redis) if ":job:" in key} == before


@pytest.mark.promise("G11")
async def test_a_message_without_a_readable_id_becomes_one_too(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        await send(fleet, "whoever", b"nonsense")
        letter = await the_letter(fleet)
        assert (letter.job_id, letter.payload) == (None, b"nonsense")


@pytest.mark.promise("G11")
async def test_a_task_under_the_subject_of_another_job_is_malformed(settings: Settings) -> None:
    async with open_fleet(settings) as fleet:
        await send(fleet, new_job_id(), make_task().to_json())
        assert "subject" in (await the_letter(fleet)).message


@pytest.mark.leaves_messages
async def test_a_newer_task_is_handed_back_for_a_newer_worker(settings: Settings, redis: Redis) -> None:
    async with open_fleet(settings) as fleet:
        task = make_task(tool="echo")
        await send(fleet, task.job_id, json.dumps(json.loads(task.to_json()) | {"v": 2}).encode())
        # This one comes after it, so the newer one has been looked at when this one is over.
        later = await fleet.submit("echo")
        assert (await fleet.over(later)).status is Status.COMPLETED

        async def handed_back() -> bool:
            return not fleet.workers[0]._jobs

        await wait_until(handed_back, "both were dealt with")
        assert await fleet.core.queue.stands(task.job_id)
        assert (await fleet.core.letters.page(0, 10)).entries == []
        assert not redis.keys(f"*:job:{task.job_id}")


@pytest.mark.promise("G6")
async def test_a_second_body_that_was_accepted_while_redis_was_away_is_not_run_and_not_forgotten(
    settings: Settings,
) -> None:
    async with open_fleet(settings) as fleet:
        first = make_task(body_hash="one")
        await send(fleet, first.job_id, first.to_json())
        assert (await fleet.over(first.job_id)).status is Status.COMPLETED
        await fleet.queue_is_empty()
        second = first.model_copy(update={"body_hash": "another"})
        await send(fleet, second.job_id, second.to_json())
        letter = await the_letter(fleet)
        assert (letter.job_id, letter.reason, letter.payload) == (
            first.job_id,
            "idempotency_conflict",
            second.to_json(),
        )
        assert fleet.bench.started == ["c1:1"]
        # The same body once more is the same job, and over.
        await send(fleet, first.job_id, first.to_json())
        await fleet.queue_is_empty()
        assert fleet.bench.started == ["c1:1"]
        assert len((await fleet.core.letters.page(0, 10)).entries) == 1
