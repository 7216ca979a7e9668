"""GET /{job_id}/stream: every event once and in order, whatever breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.api.harness import (
    BOUND_S,
    JOBS,
    Frame,
    Toolbox,
    call,
    ended,
    frames,
    in_status,
    read_stream,
    running_api,
    running_server,
    running_worker,
    submit,
)
from tests.api.test_read import watched
from tests.conftest import SettingsFactory
from tests.support.waiting import wait_until
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings


@pytest.fixture
def api_settings(make_settings: SettingsFactory, nats_url: str, redis_url: str) -> Settings:
    """Progress is told at once, heartbeats come often, and the log is short."""
    return make_settings(
        nats_url=nats_url, redis_url=redis_url, progress_interval=0, sse_heartbeat=0.1, event_log_max=50
    )


async def stepped(client: httpx.AsyncClient, tools: Toolbox, job: dict[str, str], steps: int) -> list[Frame]:
    """Run a `step` job, each step told before the next one; its events as they came."""
    told = []
    async with asyncio.timeout(BOUND_S), client.stream("GET", job["sse_url"]) as response:
        async for frame in frames(response):
            if frame.event is None:
                continue
            told.append(frame)
            if frame.event in ("tool.started", "tool.progress"):
                done = sum(f.event == "tool.progress" for f in told)
                tools.steps.put_nowait(f"step {done}" if done < steps else None)
    return told


@pytest.mark.usefixtures("worker")
async def test_a_stream_tells_a_job_from_its_queueing_to_its_end(client: httpx.AsyncClient, tools: Toolbox) -> None:
    job = await submit(client, call("step"))
    told = await stepped(client, tools, job, 3)
    kinds = ["job.queued", "job.started", "tool.started", *["tool.progress"] * 3, "tool.completed", "job.completed"]
    assert [frame.event for frame in told] == kinds
    assert [frame.id for frame in told] == [str(n) for n in range(1, 9)]
    for frame in told:
        assert frame.data["job_id"] == job["job_id"]
        assert {"attempt", "at"} <= frame.data.keys()
    assert [frame.data["message"] for frame in told[3:6]] == ["step 0", "step 1", "step 2"]
    assert told[-1].data["status"] == "completed"


async def test_the_headers_keep_proxies_from_holding_events_back(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    async with client.stream("GET", job["sse_url"]) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"


@pytest.mark.promise("G7")
@pytest.mark.usefixtures("worker")
async def test_from_every_position_of_an_ended_job_every_later_event_comes_once(
    client: httpx.AsyncClient, tools: Toolbox
) -> None:
    job = await submit(client, call("step"), call("echo", n=1))
    told = await stepped(client, tools, job, 10)
    ids = [int(frame.id or 0) for frame in told]
    assert ids == list(range(1, len(told) + 1))
    for last in range(len(told) + 1):
        assert await read_stream(client, job["sse_url"], **{"Last-Event-ID": str(last)}) == told[last:]
        assert await read_stream(client, f"{job['sse_url']}?after={last}") == told[last:]


@pytest.mark.promise("G7")
@pytest.mark.usefixtures("worker")
async def test_a_client_that_reconnects_after_every_event_of_a_running_job_sees_each_once(
    client: httpx.AsyncClient, tools: Toolbox
) -> None:
    job = await submit(client, call("step"))
    last, kinds = 0, []
    while not kinds or not kinds[-1].startswith("job.completed"):
        async with (
            asyncio.timeout(BOUND_S),
            client.stream("GET", job["sse_url"], headers={"Last-Event-ID": str(last)}) as response,
        ):
            async for frame in frames(response):
                if frame.event is not None:
                    break
        assert frame.id == str(last + 1)
        last, kinds = last + 1, [*kinds, str(frame.event)]
        if frame.event in ("tool.started", "tool.progress"):
            tools.steps.put_nowait("on" if kinds.count("tool.progress") < 10 else None)
    assert kinds.count("tool.progress") == 10


async def test_the_header_is_stronger_than_the_query(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    await client.post(job["cancel_url"])
    told = await read_stream(client, f"{job['sse_url']}?after=0", **{"Last-Event-ID": "1"})
    assert [frame.event for frame in told] == ["job.cancelled"]


async def test_who_has_the_last_event_of_an_ended_job_is_told_to_stop(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    await client.post(job["cancel_url"])
    assert (await client.get(job["sse_url"], headers={"Last-Event-ID": "2"})).status_code == 204
    first_request = await client.get(f"{job['sse_url']}?after=2")
    assert (first_request.status_code, first_request.text) == (200, "")


async def test_an_id_beyond_the_log_tells_the_log_from_its_beginning(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    await client.post(job["cancel_url"])
    told = await read_stream(client, job["sse_url"], **{"Last-Event-ID": "77"})
    assert [frame.event for frame in told] == ["gap", "job.queued", "job.cancelled"]
    assert (told[0].id, told[0].data) == (None, {"after": 77, "resumes_at": 1})


@pytest.mark.usefixtures("worker")
async def test_a_gap_is_told_where_the_log_was_trimmed(client: httpx.AsyncClient, tools: Toolbox) -> None:
    job = await submit(client, call("step"))
    told = await stepped(client, tools, job, 70)
    again = await read_stream(client, f"{job['sse_url']}?after=3")
    gap, rest = again[0], again[1:]
    assert (gap.event, gap.id) == ("gap", None)
    assert gap.data["after"] == 3
    assert gap.data["resumes_at"] == int(rest[0].id or 0) > 4
    assert rest == told[-len(rest) :]
    assert rest[-1].event == "job.completed"


async def test_heartbeats_come_as_comments_while_nothing_happens(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    comments: list[str] = []
    async with asyncio.timeout(BOUND_S), client.stream("GET", job["sse_url"]) as response:
        async for frame in frames(response):
            comments += frame.comments
            if len(comments) == 3:
                break
    assert comments == ["heartbeat"] * 3


async def test_a_client_that_goes_leaves_no_subscription_behind(client: httpx.AsyncClient, redis_url: str) -> None:
    job = await submit(client, call("echo", n=1))
    async with client.stream("GET", job["sse_url"]) as response:
        # Held in a name: a generator that is thrown away closes the response.
        told = frames(response)
        await anext(told)
        await wait_until(lambda: watched(redis_url, job["job_id"]), "the API waits for events")

    async def gone() -> bool:
        return not await watched(redis_url, job["job_id"])

    await wait_until(gone, "the API no longer waits for events")


async def test_open_streams_end_when_the_server_stops(api_settings: Settings, tools: Toolbox) -> None:
    async with running_server(api_settings, tools) as (server, client):
        job = await submit(client, call("echo", n=1))
        async with client.stream("GET", job["sse_url"]) as response:
            told: AsyncIterator[Frame] = frames(response)
            assert (await anext(told)).event == "job.queued"
            server.stop()
            async with asyncio.timeout(BOUND_S):
                assert [frame.event async for frame in told if frame.event] == []


@pytest.mark.usefixtures("worker")
async def test_a_stream_of_a_reopened_job_goes_on_to_its_new_end(client: httpx.AsyncClient, tools: Toolbox) -> None:
    job = await submit(client, call("boom"), max_retries=0)
    await ended(client, job["job_id"])
    tools.boom_fails = False
    await client.post(f"{job['poll_url']}/retry")
    kinds = [frame.event for frame in await read_stream(client, job["sse_url"])]
    assert kinds[-1] == "job.completed"
    assert kinds.count("job.failed") == 1


@pytest.mark.promise("G7")
async def test_a_stream_survives_a_restart_of_redis(
    own_settings: Settings, own_valkey: EmbeddedValkey, tools: Toolbox
) -> None:
    comments: list[str] = []
    events: list[Frame] = []
    async with (
        running_api(own_settings.model_copy(update={"sse_heartbeat": 0.2}), tools) as client,
        running_worker(own_settings, tools),
    ):
        job = await submit(client, call("hold"))
        await in_status(client, job["job_id"], "running")

        async def follow() -> None:
            async with client.stream("GET", f"{JOBS}/{job['job_id']}/stream") as response:
                async for frame in frames(response):
                    comments.extend(frame.comments)
                    if frame.event is not None:
                        events.append(frame)

        following = asyncio.create_task(follow())
        await wait_until(lambda: events, "the stream has begun")
        await own_valkey.kill()
        await wait_until(lambda: "reconnecting" in comments, "the client is told that Redis is away")
        await own_valkey.start()
        tools.release.set()
        async with asyncio.timeout(BOUND_S):
            await following
    assert [frame.id for frame in events] == [str(n) for n in range(1, len(events) + 1)]
    assert events[-1].event == "job.completed"
