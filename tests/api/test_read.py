"""Reading jobs: as they stand, held until something changes, their results, and page by page."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from redis.asyncio import Redis

from tests.api.harness import (
    JOBS,
    Toolbox,
    call,
    ended,
    in_status,
    problem,
    running_api,
    running_server,
    running_worker,
    submit,
)
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_core
from toolfleet.services.background_jobs.redis_records import partition_of, root_of
from toolfleet.settings import Settings


async def watched(redis_url: str, job_id: str) -> bool:
    """Whether somebody waits for the job's events."""
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        ((_, readers),) = await redis.pubsub_numsub(f"{root_of(job_id)}:ev:{job_id}")
        return int(readers) > 0


@pytest.mark.usefixtures("worker")
async def test_a_running_job_tells_how_far_it_is(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1), call("hold"), session_id="s-1", metadata={"who": "me"})

    async def half_done() -> bool:
        return bool((await client.get(job["poll_url"])).json()["progress"]["completed_tools"] == 1)

    await wait_until(half_done, "the first call is done")
    view = (await client.get(job["poll_url"])).json()
    assert view["status"] == "running"
    assert view["attempt"] == 1
    assert view["session_id"] == "s-1"
    assert view["metadata"] == {"who": "me"}
    assert view["worker"]
    assert not view["output_available"]
    assert view["progress"] == {
        "stage": view["progress"]["stage"],
        "percent": 50.0,
        "message": None,
        "total_tools": 2,
        "completed_tools": 1,
        "failed_tools": 0,
        "current_tool": view["progress"]["current_tool"],
    }
    assert [event["event"] for event in view["recent_events"]][:2] == ["job.queued", "job.started"]
    assert [event["id"] for event in view["recent_events"]] == list(range(1, len(view["recent_events"]) + 1))


@pytest.mark.usefixtures("worker")
async def test_a_result_is_not_there_before_the_end(client: httpx.AsyncClient, tools: Toolbox) -> None:
    job = await submit(client, call("hold"))
    early = await client.get(job["result_url"])
    assert early.status_code == 202
    assert early.headers["retry-after"] == "1"
    assert early.json()["job_id"] == job["job_id"]
    tools.release.set()
    await ended(client, job["job_id"])
    late = await client.get(job["result_url"])
    assert late.status_code == 200
    assert late.json()["results"][0]["content"] == [{"type": "text", "text": "released"}]


@pytest.mark.usefixtures("worker")
async def test_a_failed_job_has_the_results_of_its_other_calls(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("boom"), call("echo", n=5), max_retries=0)
    view = await ended(client, job["job_id"])
    assert view["status"] == "failed"
    assert view["error"]["code"] == "tool_failed"
    result = (await client.get(job["result_url"])).json()
    assert [(r["tool_name"], r["status"]) for r in result["results"]] == [("boom", "failed"), ("echo", "completed")]
    assert result["results"][1]["structured_content"] == {"n": 5}


@pytest.mark.usefixtures("worker")
async def test_a_cancelled_job_keeps_what_it_had(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("hold"), call("echo", n=5))

    async def echoed() -> bool:
        return bool((await client.get(job["poll_url"])).json()["progress"]["completed_tools"] == 1)

    await wait_until(echoed, "the second call is done")
    await client.post(job["cancel_url"])
    await ended(client, job["job_id"])
    result = (await client.get(job["result_url"])).json()
    assert result["status"] == "cancelled"
    assert [r["status"] for r in result["results"]] == ["no_result", "completed"]


@pytest.mark.usefixtures("worker")
async def test_wait_holds_the_answer_until_something_changes(
    client: httpx.AsyncClient, tools: Toolbox, redis_url: str
) -> None:
    job = await submit(client, call("hold"))
    await in_status(client, job["job_id"], "running")
    await wait_until(lambda: tools.calls["hold"] == 1, "the tool runs")
    # The event of the call's start may still be on its way; it would end the waiting too.
    await wait_until(lambda: _last_event(client, job, "tool.started"), "the start is told")
    held = asyncio.create_task(client.get(job["poll_url"], params={"wait": 60}))
    await wait_until(lambda: watched(redis_url, job["job_id"]), "the API waits for events")
    assert not held.done()
    tools.release.set()
    assert (await held).json()["progress"]["completed_tools"] == 1


async def _last_event(client: httpx.AsyncClient, job: dict[str, str], kind: str) -> bool:
    events = (await client.get(job["poll_url"])).json()["recent_events"]
    return bool(events and events[-1]["event"] == kind)


async def test_wait_ends_when_the_time_is_up_and_at_once_for_an_ended_job(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    assert (await client.get(job["poll_url"], params={"wait": 0.05})).json()["status"] == "queued"
    await client.post(job["cancel_url"])
    # The client's own bound is below these 60 s.
    assert (await client.get(job["poll_url"], params={"wait": 60})).json()["status"] == "cancelled"


async def test_wait_ends_when_the_server_stops(api_settings: Settings, tools: Toolbox, redis_url: str) -> None:
    async with running_server(api_settings, tools) as (server, client):
        job = await submit(client, call("echo", n=1))
        held = asyncio.create_task(client.get(job["poll_url"], params={"wait": 60}))
        await wait_until(lambda: watched(redis_url, job["job_id"]), "the API waits for events")
        server.stop()
        assert (await held).json()["status"] == "queued"


async def test_250_jobs_page_by_page_once_each_newest_first(client: httpx.AsyncClient) -> None:
    sent = []
    for _ in range(10):
        jobs = await asyncio.gather(*(submit(client, call("echo", n=1)) for _ in range(25)))
        sent += [job["job_id"] for job in jobs]
    seen, cursor, pages = [], None, 0
    while True:
        page = (await client.get(JOBS, params={"limit": 60} | ({"cursor": cursor} if cursor else {}))).json()
        seen += page["jobs"]
        pages, cursor = pages + 1, page["cursor"]
        if cursor is None:
            break
    assert pages == 5
    assert sorted(job["job_id"] for job in seen) == sorted(sent)
    times = [job["created_at"] for job in seen]
    assert times == sorted(times, reverse=True)


async def test_jobs_are_filtered_by_status_and_tier(client: httpx.AsyncClient) -> None:
    high = await submit(client, call("echo", n=1), priority="high")
    low = await submit(client, call("echo", n=1), priority="low")
    await client.post(low["cancel_url"])

    async def ids(**query: str) -> list[str]:
        return [job["job_id"] for job in (await client.get(JOBS, params=query)).json()["jobs"]]

    assert await ids(tier="high") == [high["job_id"]]
    assert await ids(status="cancelled") == [low["job_id"]]
    assert await ids(status="cancelled", tier="high") == []
    assert await ids() == [low["job_id"], high["job_id"]]


async def test_an_expired_job_is_410_before_and_after_the_indexes_are_pruned(
    api_settings: Settings, tools: Toolbox, redis_url: str
) -> None:
    async with running_api(api_settings, tools) as client, running_worker(api_settings, tools):
        job = await submit(client, call("echo", n=1))
        await ended(client, job["job_id"])
        job_id, root = job["job_id"], root_of(job["job_id"])
        async with Redis.from_url(redis_url, decode_responses=True) as redis:
            # As time would do: the record's keys run out, and their moment in the index has come.
            assert await redis.delete(f"{root}:job:{job_id}", f"{root}:log:{job_id}", f"{root}:res:{job_id}") == 3
            await redis.zadd(f"{root}:expiry", {f"normal:completed:{job_id}": 1})
            for tail in ("", "/result", "/stream"):
                problem(await client.get(f"{JOBS}/{job_id}{tail}"), 410, "job-expired")
            async with open_core(api_settings, name="prune") as core:
                assert await core.store.prune(partition_of(job_id), 10) == 1
            assert await redis.zcard(f"{root}:expiry") == 0
            assert await redis.pttl(f"{root}:gone") > 0
        problem(await client.get(job["result_url"]), 410, "job-expired")
        problem(await client.post(job["cancel_url"]), 410, "job-expired")
        assert (await client.get(JOBS)).json()["jobs"] == []


async def test_an_expired_key_makes_a_new_job_that_is_no_longer_gone(
    api_settings: Settings, tools: Toolbox, redis_url: str
) -> None:
    headers = {"Idempotency-Key": "again"}
    body = {"tools": [call("echo", n=1)]}
    async with running_api(api_settings, tools) as client:
        job = (await client.post(JOBS, json=body, headers=headers)).json()
        job_id, root = job["job_id"], root_of(job["job_id"])
        await client.post(job["cancel_url"])
        async with Redis.from_url(redis_url) as redis:
            await redis.delete(f"{root}:job:{job_id}", f"{root}:log:{job_id}")
            await redis.zadd(f"{root}:expiry", {f"normal:cancelled:{job_id}": 1})
        async with running_worker(api_settings, tools), open_core(api_settings, name="prune") as core:
            problem(await client.get(job["poll_url"]), 410)
            # Within the stream's window for duplicates the old message id is still known: resubmitting with `sync`
            # needs no message.
            again = await client.post(JOBS, json={**body, "mode": "sync"}, headers=headers)
            assert again.status_code == 200, again.text
            await core.store.prune(partition_of(job_id), 10)
            assert (await client.get(job["poll_url"])).json()["status"] == "completed"
