"""Reading a job's log where Redis has lost a part of it."""

from __future__ import annotations

import asyncio

from redis import Redis

from tests.background_jobs.harness import open_fleet
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.event_reader import StreamItem, read_events
from toolfleet.services.background_jobs.job_control import JobView
from toolfleet.services.background_jobs.ports import Changes, Granted, Lease
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.task_models import EventType, Gap, JobEvent, NewEvent
from toolfleet.settings import Settings

LOADED = NewEvent(EventType.TOOL_PROGRESS, {"tool_call_id": "c1", "tool_name": "echo", "progress": 1})


def saved(client: Redis, job_id: str) -> dict[bytes, bytes]:
    """What Redis holds of a job's partition at this moment."""
    keys = client.keys(f"{root_of(job_id)}:*".replace("[", "\\["))
    return {key: client.dump(key) for key in keys}  # type: ignore[union-attr, misc]


def go_back(client: Redis, job_id: str, earlier: dict[bytes, bytes]) -> None:
    """As a Redis that was restarted, or failed over, without its latest writes."""
    client.delete(*saved(client, job_id))
    for key, value in earlier.items():
        client.restore(key, 0, value)


async def test_a_reader_that_is_ahead_of_a_log_that_was_lost_begins_again_and_hears_the_end(
    settings: Settings, redis_url: str
) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        task = (await fleet.record(job_id)).task
        seen: list[StreamItem] = []

        async def read() -> None:
            # An hour between two heartbeats: what comes is not one of them.
            events = fleet.service.events(job_id, heartbeat_s=3600)
            while (item := await anext(events, None)) is not None:
                seen.append(item)

        with Redis.from_url(redis_url) as client:
            earlier = saved(client, job_id)
            reading = asyncio.create_task(read())
            granted = await fleet.core.store.claim(task, token="t", worker="w", lease_ms=60_000, published_at=None)
            assert isinstance(granted, Granted)
            for wseq in (1, 2):
                await fleet.core.store.progress(Lease(job_id, granted.fence), Changes(events=(LOADED,)), wseq)
            await wait_until(lambda: len(seen) == 4, "the reader has all")
            go_back(client, job_id, earlier)
            assert await fleet.core.client.client_kill_filter(_type="pubsub") == 1
            await wait_until(lambda: len(seen) == 6, "the reader has begun again")
        await fleet.service.cancel(job_id)
        async with asyncio.timeout(5):
            await reading
    events = [item for item in seen if isinstance(item, JobEvent)]
    assert [event.id for event in events] == [1, 2, 3, 4, 1, 2]
    assert events[-1].type is EventType.JOB_CANCELLED
    assert [item for item in seen if isinstance(item, Gap)] == [Gap(after=4, resumes_at=1)]


async def test_a_word_of_the_queue_alone_is_not_taken_for_a_lost_log(settings: Settings) -> None:
    async with open_fleet(settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        seen: list[StreamItem] = []
        asked: list[bool] = []

        async def check() -> JobView:
            view = await fleet.service.get(job_id)
            asked.append(True)
            # As while Redis can't be asked about the record, although its log could be read a moment ago.
            return JobView(None, view.record and view.record.task, degraded=True) if len(asked) == 2 else view

        async def read() -> None:
            events = read_events(fleet.core.store, fleet.core.feed, job_id, after=0, heartbeat_s=3600, check=check)
            while (item := await anext(events, None)) is not None:
                seen.append(item)

        reading = asyncio.create_task(read())
        await wait_until(lambda: len(seen) == 1, "the reader has all")
        assert await fleet.core.client.client_kill_filter(_type="pubsub") == 1
        await wait_until(lambda: len(asked) == 2, "the reader has looked back")
        await fleet.service.cancel(job_id)
        async with asyncio.timeout(5):
            await reading
    assert [item.id for item in seen if isinstance(item, JobEvent)] == [1, 2]
    assert not [item for item in seen if isinstance(item, Gap)]
