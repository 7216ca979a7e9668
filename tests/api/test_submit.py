"""POST /api/v1/jobs: what is accepted, and how."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.api.harness import JOBS, Toolbox, call, ended, job_of, problem, running_api, running_worker, submit
from tests.conftest import SettingsFactory
from toolfleet.services.background_jobs.task_models import is_job_id
from toolfleet.settings import Settings


async def test_accepted_with_all_links(client: httpx.AsyncClient) -> None:
    answer = await client.post(JOBS, json=job_of(call("echo", n=1)))
    assert answer.status_code == 202
    body = answer.json()
    job_id = body["job_id"]
    assert is_job_id(job_id)
    assert body == {
        "job_id": job_id,
        "task_id": f"{job_id}:1",
        "status": "queued",
        "poll_url": f"{JOBS}/{job_id}",
        "result_url": f"{JOBS}/{job_id}/result",
        "sse_url": f"{JOBS}/{job_id}/stream",
        "cancel_url": f"{JOBS}/{job_id}/cancel",
        "degraded": False,
    }
    assert answer.headers["location"] == f"{JOBS}/{job_id}"
    assert len(answer.headers["idempotency-key"]) == 36


async def test_urls_carry_the_public_prefix(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, tools: Toolbox
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, public_url="https://jobs.example.org/fleet/")
    async with running_api(settings, tools) as client:
        answer = await client.post(JOBS, json=job_of(call("echo", n=1)))
    prefix = f"https://jobs.example.org/fleet{JOBS}/{answer.json()['job_id']}"
    assert answer.headers["location"] == prefix
    assert answer.json()["sse_url"] == f"{prefix}/stream"


@pytest.mark.usefixtures("worker")
async def test_every_call_runs_and_results_come_in_their_order(client: httpx.AsyncClient) -> None:
    calls = [{**call("echo", n=n), "tool_call_id": f"c{n}"} for n in (3, 1, 2)] + [call("echo", n=4)]
    job = await submit(client, *calls)
    await ended(client, job["job_id"])
    result = (await client.get(job["result_url"])).json()
    assert result["status"] == "completed"
    assert [(r["tool_call_id"], r["structured_content"]) for r in result["results"]] == [
        ("c3", {"n": 3}),
        ("c1", {"n": 1}),
        ("c2", {"n": 2}),
        ("call_4", {"n": 4}),
    ]


async def test_a_synchronous_run_answers_with_the_whole_job_and_its_results(
    client: httpx.AsyncClient, tools: Toolbox
) -> None:
    answer = await client.post(JOBS, json=job_of(call("echo", n=7), mode="sync"))
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "completed"
    assert body["fallback_reason"] is None
    assert body["results"][0]["structured_content"] == {"n": 7}
    assert body["progress"]["completed_tools"] == 1
    assert (await client.get(body["result_url"])).json()["results"] == body["results"]
    assert tools.calls["echo"] == 1


async def test_a_failed_synchronous_run_says_so(client: httpx.AsyncClient) -> None:
    answer = await client.post(JOBS, json=job_of(call("boom"), mode="sync", max_retries=0))
    assert answer.status_code == 200
    assert answer.json()["status"] == "failed"
    assert answer.json()["results"][0]["error"]["code"] == "server_error"


@pytest.mark.promise("G6")
@pytest.mark.usefixtures("worker")
async def test_the_same_key_50_times_at_once_is_one_job(client: httpx.AsyncClient, tools: Toolbox) -> None:
    body = job_of(call("echo", n=1))
    headers = {"Idempotency-Key": "order-4711"}
    answers = await asyncio.gather(*(client.post(JOBS, json=body, headers=headers) for _ in range(50)))
    assert {answer.status_code for answer in answers} <= {200, 202}
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    assert {answer.headers["idempotency-key"] for answer in answers} == {"order-4711"}
    await ended(client, answers[0].json()["job_id"])
    assert tools.calls["echo"] == 1


@pytest.mark.promise("G6")
async def test_the_same_key_after_a_restart_is_the_same_job_and_another_body_is_refused(
    api_settings: Settings, tools: Toolbox
) -> None:
    headers = {"Idempotency-Key": "order-4711"}
    async with running_api(api_settings, tools) as client, running_worker(api_settings, tools):
        first = await client.post(JOBS, json=job_of(call("echo", n=1)), headers=headers)
        await ended(client, first.json()["job_id"])
    async with running_api(api_settings, tools) as client:
        again = await client.post(JOBS, json=job_of(call("echo", n=1)), headers=headers)
        other = await client.post(JOBS, json=job_of(call("echo", n=2)), headers=headers)
    assert again.status_code == 200
    assert again.json()["job_id"] == first.json()["job_id"]
    assert again.json()["status"] == "completed"
    assert again.json()["results"][0]["structured_content"] == {"n": 1}
    assert problem(other, 422, "idempotency-conflict")["job_id"] == first.json()["job_id"]
    assert tools.calls["echo"] == 1


async def test_a_key_that_was_made_for_the_caller_finds_its_job(client: httpx.AsyncClient) -> None:
    first = await client.post(JOBS, json=job_of(call("echo", n=1)))
    headers = {"Idempotency-Key": first.headers["idempotency-key"]}
    again = await client.post(JOBS, json=job_of(call("echo", n=1)), headers=headers)
    assert again.status_code == 200
    assert again.json()["job_id"] == first.json()["job_id"]
    assert again.json()["results"] is None


async def test_jobs_without_a_key_are_different_jobs(client: httpx.AsyncClient) -> None:
    jobs = [await submit(client, call("echo", n=1)) for _ in range(3)]
    assert len({job["job_id"] for job in jobs}) == 3


async def test_a_delayed_job_waits(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1), delay_seconds=600)
    view = (await client.get(job["poll_url"])).json()
    assert view["status"] == "queued"
    assert view["next_attempt_at"] > view["created_at"]
