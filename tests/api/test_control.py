"""Cancel, retry and resolve."""

from __future__ import annotations

import httpx
import pytest

from tests.api.harness import JOBS, Toolbox, call, ended, problem, submit
from tests.support.waiting import wait_until


async def test_a_queued_job_is_cancelled_at_once(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    answer = await client.post(job["cancel_url"], json={"reason": "changed my mind"})
    assert answer.status_code == 202
    assert answer.json() == {
        "job_id": job["job_id"],
        "outcome": "cancelled",
        "reached": "queued",
        "calls": [{"tool_call_id": "call_1", "tool_name": "echo", "state": "not_sent"}],
        "still_running": [],
        "status": "cancelled",
        "worker": None,
    }
    stats = (await client.get(f"{JOBS}/stats")).json()
    assert stats["queue"]["messages"] == 0
    events = (await client.get(job["poll_url"])).json()["recent_events"]
    assert (events[-1]["event"], events[-1]["data"]["reason"]) == ("job.cancelled", "changed my mind")


@pytest.mark.usefixtures("worker")
async def test_a_running_job_is_cancelled_down_to_its_tool(client: httpx.AsyncClient, tools: Toolbox) -> None:
    job = await submit(client, call("hold"))
    await wait_until(lambda: tools.calls["hold"] == 1, "the tool runs")
    answer = await client.post(job["cancel_url"])
    assert answer.status_code == 202
    body = answer.json()
    assert body["outcome"] == "cancelled"
    assert body["reached"] == "tool"
    assert body["status"] == "cancelled"
    assert body["still_running"] == []
    assert body["calls"] == [{"tool_call_id": "call_1", "tool_name": "hold", "state": "stopped"}]
    again = (await client.post(job["cancel_url"])).json()
    assert again == body | {"outcome": "already_cancelled", "worker": None}


async def test_cancelling_twice_is_a_200(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    await client.post(job["cancel_url"])
    again = await client.post(job["cancel_url"])
    assert again.status_code == 200
    assert again.json()["outcome"] == "already_cancelled"


@pytest.mark.usefixtures("worker")
async def test_cancelling_what_ended_otherwise_is_a_409(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    await ended(client, job["job_id"])
    body = problem(await client.post(job["cancel_url"]), 409, "illegal-move")
    assert body["job_status"] == "completed"


@pytest.mark.usefixtures("worker")
async def test_retry_runs_what_did_not_succeed_again(client: httpx.AsyncClient, tools: Toolbox) -> None:
    job = await submit(client, call("boom"), call("echo", n=1), max_retries=0)
    assert (await ended(client, job["job_id"]))["status"] == "failed"
    tools.boom_fails = False
    answer = await client.post(f"{job['poll_url']}/retry")
    assert answer.status_code == 202
    assert answer.headers["location"] == job["poll_url"]
    assert answer.json()["task_id"] == f"{job['job_id']}:2"
    assert (await ended(client, job["job_id"]))["status"] == "completed"
    assert tools.calls == {"boom": 2, "echo": 1}


async def test_retry_of_a_queued_job_is_a_409(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    body = problem(await client.post(f"{job['poll_url']}/retry"), 409, "illegal-move")
    assert body["job_status"] == "queued"


@pytest.mark.usefixtures("worker")
async def test_a_call_of_unknown_outcome_is_decided_once(client: httpx.AsyncClient, tools: Toolbox) -> None:
    job = await submit(client, call("lost"), call("echo", n=1))
    view = await ended(client, job["job_id"])
    assert view["status"] == "unknown"
    assert view["undecided_calls"] == ["call_1"]
    result = (await client.get(job["result_url"])).json()
    assert [r["status"] for r in result["results"]] == ["unknown", "completed"]

    resolve_url = f"{job['poll_url']}/resolve"
    foreign = {"tool_call_id": "call_9", "decision": "rerun"}
    answer = problem(await client.post(resolve_url, json=foreign), 404, "call-not-found")
    assert answer["job_id"] == job["job_id"]
    known = {"tool_call_id": "call_2", "decision": "rerun"}
    answer = problem(await client.post(resolve_url, json=known), 409, "illegal-move")
    assert (answer["job_id"], answer["tool_call_id"]) == (job["job_id"], "call_2")
    for other in ("rerun", "failed"):
        given = {"tool_call_id": "call_1", "decision": other, "result": {"order": 4711}}
        problem(await client.post(resolve_url, json=given), 422, "invalid-request")

    decision = {
        "tool_call_id": "call_1",
        "decision": "completed",
        "result": {"order": 4711},
        "note": "seen in the shop",
    }
    answer = await client.post(resolve_url, json=decision)
    assert answer.status_code == 200
    assert answer.json()["status"] == "completed"
    assert answer.json()["generation"] == 2
    answer = problem(await client.post(resolve_url, json=decision), 409, "illegal-move")
    assert answer["job_id"] == job["job_id"]
    result = (await client.get(job["result_url"])).json()
    assert result["results"][0]["structured_content"] == {"order": 4711}
    assert tools.calls == {"lost": 1, "echo": 1}


async def test_a_malformed_decision_is_refused(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    for body in (
        {},
        {"tool_call_id": "call_1", "decision": "maybe"},
        {"tool_call_id": "call_1", "decision": "rerun", "who": "me"},
    ):
        problem(await client.post(f"{job['poll_url']}/resolve", json=body), 422, "invalid-request")
    for text in ("NaN", "1e999", "[" * 100 + "]" * 100, '"\\ud800"'):
        content = '{"tool_call_id":"call_1","decision":"completed","result":' + text + "}"
        answer = await client.post(
            f"{job['poll_url']}/resolve", content=content, headers={"Content-Type": "application/json"}
        )
        problem(answer, 422, "invalid-request")


async def test_an_unknown_field_of_a_reason_is_refused(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("echo", n=1))
    problem(await client.post(job["cancel_url"], json={"because": "no"}), 422, "invalid-request")
    assert (await client.get(job["poll_url"])).json()["status"] == "queued"
