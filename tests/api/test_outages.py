"""Parts that are down: what is still answered, and what is said of the rest."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.api.harness import (
    BOUND_S,
    JOBS,
    Toolbox,
    call,
    ended,
    frames,
    job_of,
    problem,
    running_api,
    running_worker,
    submit,
)
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.task_models import derived_job_id
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

NO_JOB = "job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB"


async def down(client: httpx.AsyncClient) -> list[str]:
    """The parts that are down, as /health/ready names them."""
    answer = await client.get("/health/ready")
    return [] if answer.status_code == 200 else list(answer.json()["down"])


async def without_nats(client: httpx.AsyncClient, server: EmbeddedNats) -> None:
    await server.kill()

    async def noticed() -> bool:
        return "nats" in await down(client)

    await wait_until(noticed, "the API knows that NATS is gone")


@pytest.mark.promise("G12")
async def test_queue_down_a_caller_that_allows_it_gets_a_synchronous_run(
    own_settings: Settings, own_nats: EmbeddedNats, tools: Toolbox
) -> None:
    async with running_api(own_settings, tools) as client:
        await without_nats(client, own_nats)
        answer = await client.post(JOBS, json=job_of(call("echo", n=3), fallback="sync"))
        assert answer.status_code == 200
        body = answer.json()
        assert body["fallback_reason"] == "Queue unavailable"
        assert body["status"] == "completed"
        assert body["results"][0]["structured_content"] == {"n": 3}
        assert (await client.get(body["result_url"])).json()["results"] == body["results"]


@pytest.mark.promise("G12")
async def test_queue_down_any_other_caller_gets_a_503_and_the_key_to_ask_again(
    own_settings: Settings, own_nats: EmbeddedNats, tools: Toolbox
) -> None:
    async with running_api(own_settings, tools) as client:
        await without_nats(client, own_nats)
        answer = await client.post(JOBS, json=job_of(call("echo", n=3)))
        body = problem(answer, 503, "queue-unavailable")
        key = answer.headers["idempotency-key"]
        assert int(answer.headers["retry-after"]) > 0
        assert body["accepted"] is False
        assert body["job_id"] == derived_job_id("default", key)
        await own_nats.start()

        async def back() -> bool:
            return not await down(client)

        await wait_until(back, "the API has its queue back", timeout=20)
        again = await client.post(JOBS, json=job_of(call("echo", n=3)), headers={"Idempotency-Key": key})
        assert again.status_code == 202
        assert again.json()["job_id"] == body["job_id"]


@pytest.mark.promise("G12")
async def test_a_queue_that_gives_no_answer_leaves_it_open_whether_the_job_was_accepted(
    own_settings: Settings, own_nats: EmbeddedNats, tools: Toolbox
) -> None:
    async with running_api(own_settings, tools) as client:
        await own_nats.pause()
        try:
            answer = await client.post(JOBS, json=job_of(call("echo", n=3)), headers={"Idempotency-Key": "k"})
        finally:
            await own_nats.resume()
        body = problem(answer, 503, "queue-unavailable")
        assert body["accepted"] == "unknown"
        assert answer.headers["idempotency-key"] == "k"

        async def told() -> bool:
            again = await client.post(JOBS, json=job_of(call("echo", n=3)), headers={"Idempotency-Key": "k"})
            return again.status_code in (200, 202) and again.json()["job_id"] == body["job_id"]

        await wait_until(told, "the same key tells what became of it", timeout=20)
        async with running_worker(own_settings, tools):
            await ended(client, body["job_id"])
        assert tools.calls["echo"] == 1


async def test_redis_down_a_job_is_still_accepted_and_reads_are_degraded(
    own_settings: Settings, own_valkey: EmbeddedValkey, tools: Toolbox
) -> None:
    async with running_api(own_settings, tools) as client:
        known = await submit(client, call("echo", n=1))
        await own_valkey.kill()
        accepted = await client.post(JOBS, json=job_of(call("echo", n=2)), headers={"Idempotency-Key": "k"})
        assert (accepted.status_code, accepted.json()["degraded"], known["degraded"]) == (202, True, False)
        for url in (known["poll_url"], accepted.json()["poll_url"]):
            view = await client.get(url)
            assert view.status_code == 200
            assert view.json()["status"] == "queued_or_running"
            assert view.json()["degraded"] is True
        result = await client.get(known["result_url"])
        assert (result.status_code, result.json()["status"]) == (202, "queued_or_running")
        again = await client.post(JOBS, json=job_of(call("echo", n=2)), headers={"Idempotency-Key": "k"})
        assert again.status_code == 200
        assert again.json()["degraded"] is True
        assert again.json()["job_id"] == accepted.json()["job_id"]
        other = await client.post(JOBS, json=job_of(call("echo", n=3)), headers={"Idempotency-Key": "k"})
        problem(other, 422, "idempotency-conflict")
        # Never a false 404: nobody can say now that there is no such job.
        for url in (f"{JOBS}/{NO_JOB}", JOBS, f"{JOBS}/stats", "/api/v1/workers"):
            problem(await client.get(url), 503, "store-unavailable")
        problem(await client.post(known["cancel_url"]), 503, "store-unavailable")
        assert await down(client) == ["redis"]
        await own_valkey.start()
        async with running_worker(own_settings, tools):
            for job in (known, accepted.json()):
                assert (await ended(client, job["job_id"]))["status"] == "completed"


async def test_redis_down_a_stream_begins_and_says_that_it_waits(
    own_settings: Settings, own_valkey: EmbeddedValkey, tools: Toolbox
) -> None:
    async with running_api(own_settings, tools) as client:
        job = await submit(client, call("echo", n=1))
        await own_valkey.kill()
        async with client.stream("GET", job["sse_url"]) as response:
            assert response.status_code == 200
            told = frames(response)
            assert (await anext(told)).comments == ["reconnecting"]
            await own_valkey.start()
            async for frame in told:
                if frame.event is not None:
                    break
            assert (frame.event, frame.id) == ("job.queued", "1")


@pytest.mark.promise("G7")
async def test_redis_stopped_a_stream_says_so_at_once_and_goes_on_where_it_was(
    own_settings: Settings, own_valkey: EmbeddedValkey, tools: Toolbox
) -> None:
    # No heartbeat comes in this test: what is said is said because of the outage.
    settings = own_settings.model_copy(update={"sse_heartbeat": 3600.0})
    async with running_api(settings, tools) as client, running_worker(settings, tools):
        job = await submit(client, call("step"))
        seen: list[str | None] = []
        async with asyncio.timeout(BOUND_S), client.stream("GET", job["sse_url"]) as response:
            told = frames(response)
            tools.steps.put_nowait("first")
            async for frame in told:
                seen.append(frame.id)
                if frame.event == "tool.progress":
                    break
            await own_valkey.pause()
            # The one that waits for its answer; those who come after it do not.
            problem(await client.get("/api/v1/workers"), 503, "store-unavailable")
            assert (await anext(told)).comments == ["reconnecting"]
            for n in range(30):
                assert (await client.post(JOBS, json=job_of(call("echo", n=n)))).status_code == 202
                view = (await client.get(job["poll_url"])).json()
                assert (view["status"], view["degraded"]) == ("queued_or_running", True)
                problem(await client.get(f"{JOBS}/{NO_JOB}"), 503, "store-unavailable")
            await own_valkey.resume()
            for text in ("second", None):
                tools.steps.put_nowait(text)
            seen += [frame.id async for frame in told if frame.event is not None]
        assert seen == [str(n) for n in range(1, len(seen) + 1)]


@pytest.mark.promise("G12")
async def test_with_both_down_only_what_surely_stands_nowhere_is_run(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey, tools: Toolbox
) -> None:
    async with running_api(own_settings, tools) as client:
        await without_nats(client, own_nats)
        await own_valkey.kill()
        answer = await client.post(JOBS, json=job_of(call("echo", n=3), fallback="sync"))
        assert answer.status_code == 200
        assert answer.json()["status"] == "completed"
        assert answer.json()["results"][0]["structured_content"] == {"n": 3}
        failed = await client.post(JOBS, json=job_of(call("boom"), fallback="sync", max_retries=0))
        assert failed.json()["status"] == "failed"
        refused = problem(await client.post(JOBS, json=job_of(call("echo", n=3))), 503)
        assert refused["accepted"] is False
        assert set(await down(client)) == {"nats", "streams", "redis"}


@pytest.mark.promise("G5")
async def test_with_both_down_a_key_that_may_have_been_used_is_not_run_a_second_time(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey, tools: Toolbox
) -> None:
    body = job_of(call("lost"), fallback="sync", max_retries=0)
    headers = {"Idempotency-Key": "k"}
    async with running_api(own_settings, tools) as client:
        assert (await client.post(JOBS, json=body, headers=headers)).status_code == 202
        await without_nats(client, own_nats)
        await own_valkey.kill()
        again = problem(await client.post(JOBS, json=body, headers=headers), 503, "queue-unavailable")
        assert again["accepted"] == "unknown"
        await own_nats.start()
        await own_valkey.start()
    async with running_api(own_settings, tools) as client, running_worker(own_settings, tools):
        await ended(client, again["job_id"])
    assert tools.calls["lost"] == 1


async def test_nats_down_what_redis_knows_is_answered_and_the_rest_is_no_false_404(
    own_settings: Settings, own_nats: EmbeddedNats, tools: Toolbox
) -> None:
    async with running_api(own_settings, tools) as client:
        job = await submit(client, call("echo", n=1))
        await without_nats(client, own_nats)
        assert (await client.get(job["poll_url"])).json()["status"] == "queued"
        problem(await client.get(f"{JOBS}/{NO_JOB}"), 503, "queue-unavailable")
        stats = (await client.get(f"{JOBS}/stats")).json()
        assert stats["queue"] is None
        assert stats["dead_letters"] is None
        assert any("NATS" in warning for warning in stats["warnings"])
        problem(await client.get("/api/v1/dead-letters"), 503, "queue-unavailable")
        # The job ends in the store; its message is acked when a worker meets it.
        assert (await client.post(job["cancel_url"])).status_code == 202


async def test_a_full_queue_is_a_429(own_settings: Settings, tools: Toolbox) -> None:
    settings = own_settings.model_copy(update={"stream_max_bytes": 1 << 20})
    async with running_api(settings, tools) as client:
        big = job_of(call("echo", n=1, text="x" * 600_000))
        assert (await client.post(JOBS, json=big)).status_code == 202
        answer = await client.post(JOBS, json=big)
        body = problem(answer, 429, "queue-full")
        assert int(answer.headers["retry-after"]) > 0
        assert body["accepted"] is False
        assert body["job_id"]
        assert body["tier"] == "normal"
        assert body["limit"] < 1 << 20, "refused before the stream overflows"
        assert body["waiting"] == 1


async def test_tools_that_were_never_reached_are_a_503(own_settings: Settings) -> None:
    # No tool server is configured and none was ever seen: whether the tool exists can't be told.
    async with running_api(own_settings, None) as client:
        body = problem(await client.post(JOBS, json=job_of(call("echo", n=1))), 503, "tools-unavailable")
        assert body["accepted"] is False
        assert await down(client) == ["tools"]
        assert (await client.get("/api/v1/tools")).json() == {"tools": []}
