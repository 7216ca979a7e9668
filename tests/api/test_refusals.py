"""Bad input is refused with a reason before anything is queued (G11), and nothing a stranger sends is a 500."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.api.harness import JOBS, Toolbox, call, job_of, problem, running_api
from tests.conftest import SettingsFactory

JSON = {"Content-Type": "application/json"}
NO_JOB = "job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB"


async def nothing_queued(client: httpx.AsyncClient) -> bool:
    stats = (await client.get(f"{JOBS}/stats")).json()
    return bool(stats["queue"]["messages"] == 0 and sum(stats["totals"].values()) == 0)


@pytest.mark.promise("G11")
async def test_an_unknown_tool_is_refused_with_the_nearest_names(client: httpx.AsyncClient) -> None:
    answer = await client.post(JOBS, json=job_of(call("echo", n=1), call("ecco")))
    body = problem(answer, 422, "unknown-tool")
    assert body["nearest"] == ["echo"]
    assert body["tool_call_id"] == "call_2"
    assert await nothing_queued(client)


@pytest.mark.promise("G11")
async def test_arguments_are_checked_against_the_schema(client: httpx.AsyncClient) -> None:
    answer = await client.post(JOBS, json=job_of(call("echo", n=1), call("echo", n="one")))
    body = problem(answer, 422, "invalid-arguments")
    assert body["path"] == "$.n"
    assert body["tool_call_id"] == "call_2"
    assert await nothing_queued(client)


@pytest.mark.promise("G11")
@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"tools": []}, "$.tools"),
        ({}, "$.tools"),
        ([], "$"),
        (job_of(call("echo", n=1), colour="red"), "$.colour"),
        (job_of({**call("echo", n=1), "colour": "red"}), "$.tools[0].colour"),
        (job_of(call("echo", n=1), max_retries="2"), "$.max_retries"),
        (job_of(call("echo", n=1), priority="urgent"), "$.priority"),
        (job_of(call("echo", n=1), run_at=1893456000), "$.run_at"),
        (job_of(call("echo", n=1), run_at="2030-01-01T00:00:00"), "$.run_at"),
        (job_of(call("echo", n=1), run_at="9999-12-31T23:59:59-12:00"), "$.run_at"),
        (job_of(call("echo", n=1), delay_seconds=1, run_at="2030-01-01T00:00:00Z"), "$"),
        (job_of(call("echo", n=1), timeout_seconds=0), "$.timeout_seconds"),
        (job_of(*({**call("echo", n=1), "tool_call_id": "same"} for _ in range(2))), "$"),
    ],
)
async def test_the_answer_says_where_a_body_is_wrong(client: httpx.AsyncClient, body: Any, path: str) -> None:
    answer = problem(await client.post(JOBS, json=body), 422, "invalid-request")
    assert answer["path"] == path
    assert answer["errors"][0]["in"] == "body"
    assert await nothing_queued(client)


@pytest.mark.promise("G11")
async def test_more_than_100_calls_are_refused(client: httpx.AsyncClient) -> None:
    assert (await client.post(JOBS, json=job_of(*(call("echo", n=n) for n in range(100))))).status_code == 202
    problem(await client.post(JOBS, json=job_of(*(call("echo", n=n) for n in range(101)))), 422, "invalid-request")


def _metadata(text: str) -> bytes:
    return b'{"tools":[{"tool_name":"echo","tool_args":{"n":1}}],"metadata":{"x":' + text.encode() + b"}}"


@pytest.mark.promise("G11")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        _metadata("[" * 100_000),
        _metadata("[" * 100_000 + "]" * 100_000),
        _metadata("[" * 65 + "]" * 65),
        _metadata('{"a":' * 100 + "1" + "}" * 100),
        _metadata("NaN"),
        _metadata("-Infinity"),
        _metadata("1e999"),
        _metadata("9" * 5000),
        _metadata('"\\ud800"'),
        _metadata('"\x00"'),
    ],
    ids=lambda body: repr(body[:24] + b".." + body[-12:]),
)
async def test_hostile_json_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    problem(await client.post(JOBS, content=body, headers=JSON), 422, "invalid-request")
    assert await nothing_queued(client)


@pytest.mark.parametrize(
    "text", ["9" * 300, "-" + "9" * 4000, "1." + "9" * 4000, '"\\u0000"', '"\\ud83d\\ude00"', '{"":{"a":1,"a":2}}']
)
async def test_odd_json_is_carried(client: httpx.AsyncClient, text: str) -> None:
    answer = await client.post(JOBS, content=_metadata(text), headers=JSON)
    assert answer.status_code == 202
    job = await client.get(answer.json()["poll_url"])
    assert job.json()["metadata"]["x"] == json.loads(text)


async def test_a_body_that_is_not_announced_as_json_is_refused(client: httpx.AsyncClient) -> None:
    body = json.dumps(job_of(call("echo", n=1)))
    for media_type in ("application/x-www-form-urlencoded", "text/plain", ""):
        problem(await client.post(JOBS, content=body, headers={"Content-Type": media_type}), 415)
    accepted = await client.post(
        JOBS, content=body, headers={"Content-Type": "application/vnd.jobs+json; charset=utf-8"}
    )
    assert accepted.status_code == 202


async def test_an_announced_body_above_the_limit_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post(JOBS, content=b" " * (900 * 1024 + 1), headers=JSON)
    assert problem(answer, 413, "too-large")["limit"] == 900 * 1024
    assert answer.headers["idempotency-key"]


async def test_a_streamed_body_above_the_limit_is_refused_by_what_comes(client: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    problem(await client.post(JOBS, content=body(), headers=JSON), 413, "too-large")


async def test_a_job_that_is_too_large_as_a_task_is_refused(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, tools: Toolbox
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, max_body_bytes=1024)
    async with running_api(settings, tools) as client:
        empty = json.dumps(job_of(call("echo", n=1, text=""))).encode()
        fits_as_body = json.dumps(job_of(call("echo", n=1, text="x" * (1024 - len(empty))))).encode()
        assert len(fits_as_body) == 1024
        answer = problem(await client.post(JOBS, content=fits_as_body, headers=JSON), 413, "too-large")
        assert answer["limit"] == 1024
        assert answer["size"] > 1024


async def test_malformed_idempotency_keys_are_refused(client: httpx.AsyncClient) -> None:
    for key in (b"", b"a b", b"x" * 256, "schl\u00fcssel".encode(), b"tab\tinside"):
        headers = httpx.Headers([(b"Idempotency-Key", key)])
        problem(await client.post(JOBS, json=job_of(call("echo", n=1)), headers=headers), 422, "invalid-request")
    assert await nothing_queued(client)


async def test_a_malformed_or_foreign_id_is_a_404(client: httpx.AsyncClient) -> None:
    operations = [("GET", ""), ("GET", "/result"), ("GET", "/stream"), ("POST", "/cancel"), ("POST", "/retry")]
    for job_id in ("x", "job_1", NO_JOB.lower(), "%00", "job_8" + "0" * 25, NO_JOB):
        for method, tail in operations:
            problem(await client.request(method, f"{JOBS}/{job_id}{tail}"), 404, "job-not-found")
        decision = {"tool_call_id": "call_1", "decision": "rerun"}
        problem(await client.post(f"{JOBS}/{job_id}/resolve", json=decision), 404, "job-not-found")


async def test_frameworks_own_errors_are_problems_too(client: httpx.AsyncClient) -> None:
    problem(await client.get("/nothing"), 404)
    problem(await client.get(f"{JOBS}/"), 404)
    refused = await client.put(JOBS)
    problem(refused, 405)
    assert set(refused.headers["allow"].split(", ")) == {"GET", "POST"}


async def test_malformed_queries_are_refused(client: httpx.AsyncClient) -> None:
    pages = [
        "limit=0",
        "limit=201",
        "limit=x",
        "status=odd",
        "tier=odd",
        "cursor=x",
        "cursor=1_x",
        f"cursor=²_{NO_JOB}",
    ]
    letters = ["cursor=-1", "cursor=x", f"cursor={2**64}", "limit=0", "limit=201"]
    waits = ["wait=-1", "wait=61", "wait=nan", "wait=x"]
    queries = [*(f"{JOBS}?{page}" for page in pages), *(f"/api/v1/dead-letters?{letter}" for letter in letters)]
    for url in (*queries, *(f"{JOBS}/{NO_JOB}?{wait}" for wait in waits)):
        body = problem(await client.get(url), 422, "invalid-request")
        assert body["errors"][0]["in"] == "query"


async def test_malformed_event_ids_are_refused(client: httpx.AsyncClient) -> None:
    for last in ("x", "-1", "1.5", "9" * 16, ""):
        problem(await client.get(f"{JOBS}/{NO_JOB}/stream", headers={"Last-Event-ID": last}), 422, "invalid-request")
        problem(await client.get(f"{JOBS}/{NO_JOB}/stream", params={"after": last}), 422, "invalid-request")


@pytest.mark.parametrize("path", [JOBS, f"{JOBS}/stats", f"{JOBS}/{NO_JOB}", f"{JOBS}/{NO_JOB}/stream",
                                  "/api/v1/tools", "/api/v1/workers", "/api/v1/dead-letters"])  # fmt: skip
async def test_a_query_parameter_that_is_not_there_is_refused_by_its_name(client: httpx.AsyncClient, path: str) -> None:
    body = problem(await client.get(path, params={"statsu": "failed"}), 422, "invalid-request")
    assert "'statsu'" in body["detail"]
    assert body["path"] == "$.statsu"


async def test_a_misspelt_filter_is_refused_with_the_nearest_one(client: httpx.AsyncClient) -> None:
    body = problem(await client.get(JOBS, params={"statsu": "failed", "limit": 5}), 422, "invalid-request")
    assert body["nearest"] == ["status"]
    assert "takes cursor, limit, status, tier" in body["detail"]
    assert (await client.get(JOBS, params={"status": "failed", "tier": "low", "limit": 5})).status_code == 200
