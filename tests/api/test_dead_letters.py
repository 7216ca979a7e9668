"""Dead letters over HTTP: list, show, redrive, discard."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.api.harness import JOBS, Toolbox, call, ended, in_status, problem, running_worker, submit
from tests.support.waiting import wait_until
from toolfleet.bootstrap import Core, open_core
from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.settings import Settings

LETTERS = "/api/v1/dead-letters"
USER = {"X-Toolfleet-User": "alice"}


@pytest.fixture
async def core(api_settings: Settings) -> AsyncIterator[Core]:
    async with open_core(api_settings, name="test") as opened:
        yield opened


async def dead_job(client: httpx.AsyncClient, core: Core, tools: Toolbox) -> dict[str, Any]:
    """A job whose workers died three times, and that a fourth one has buried."""
    job = await submit(client, call("echo", n=1), call("boom"), metadata={"order": 4711})
    job_id = job["job_id"]
    record = await core.store.get(job_id)
    assert record is not None
    for number in range(3):
        await core.store.claim(record.task, token=f"t{number}", worker="killed", lease_ms=60_000, published_at=None)
        await core.client.hset(f"{root_of(job_id)}:job:{job_id}", "lease_until", 1)
    async with running_worker(core.settings, tools):
        assert (await ended(client, job_id))["error"]["code"] == "too_many_starts"
    return job


async def malformed(client: httpx.AsyncClient, core: Core, tools: Toolbox, data: bytes) -> dict[str, Any]:
    """The letter of a message that is no job."""
    subject = core.queue.names.subject(Tier.NORMAL, "nonsense")
    await core.connection.request(subject, data, 5)

    async def listed() -> list[dict[str, Any]]:
        answer = (await client.get(LETTERS, params={"reason": "malformed"})).json()
        return [letter for letter in answer["dead_letters"] if letter["payload_bytes"] == len(data)]

    async with running_worker(core.settings, tools):
        found = await wait_until(listed, "the message is a dead letter")
    assert found is not None
    return found[0]


async def test_a_dead_job_is_shown_with_its_whole_history_and_redriven(
    client: httpx.AsyncClient, core: Core, tools: Toolbox
) -> None:
    job = await dead_job(client, core, tools)
    job_id = job["job_id"]
    (entry,) = (await client.get(LETTERS)).json()["dead_letters"]
    assert (entry["id"], entry["attempt"], entry["generation"], entry["malformed"]) == (job_id, 4, 1, False)
    shown = (await client.get(f"{LETTERS}/{job_id}")).json()
    assert shown["letters"] == [entry]
    assert [(run["attempt"], run["worker"], run["outcome"]) for run in shown["attempts"][:3]] == [
        (attempt, "killed", "no_word") for attempt in (1, 2, 3)
    ]
    assert shown["attempts"][3]["outcome"] == "failed"
    assert [event["event"] for event in shown["events"]][:2] == ["job.queued", "job.started"]
    assert shown["errors"][-1]["error"]["code"] == "too_many_starts"
    assert shown["task"]["metadata"] == {"order": 4711}
    assert [(c["tool_name"], c["tool_args"], c["result"]) for c in shown["task"]["calls"]] == [
        ("echo", {"n": 1}, None),
        ("boom", {}, None),
    ]
    assert (shown["job"]["status"], shown["raw"]) == ("failed", None)

    tools.boom_fails = False
    answer = await client.post(f"{LETTERS}/{job_id}/redrive", json={"note": "up again"}, headers=USER)
    assert answer.status_code == 202
    assert answer.headers["location"] == job["poll_url"]
    assert answer.json()["task_id"] == f"{job_id}:2"
    problem(await client.get(f"{LETTERS}/{job_id}"), 404, "dead-letter-not-found")
    problem(await client.post(f"{LETTERS}/{job_id}/redrive"), 404, "dead-letter-not-found")
    async with running_worker(core.settings, tools):
        after = await ended(client, job_id)
    assert (after["status"], after["generation"]) == ("completed", 2)
    opened = next(event for event in after["recent_events"] if event["data"].get("reason") == "redrive")
    assert (opened["data"]["by"], opened["data"]["note"]) == ("alice", "up again")


@pytest.mark.parametrize(
    ("data", "encoding"), [('{"not": "a task \N{SNOWMAN}"}'.encode(), "utf-8"), (b"\xff\x00\xfe", "base64")]
)
async def test_a_malformed_message_is_shown_raw(
    client: httpx.AsyncClient, core: Core, tools: Toolbox, data: bytes, encoding: str
) -> None:
    letter = await malformed(client, core, tools, data)
    assert (letter["job_id"], letter["malformed"]) == (None, True)
    shown = (await client.get(f"{LETTERS}/{letter['id']}")).json()
    raw = shown["raw"]
    assert raw["subject"].endswith("normal.nonsense")
    assert (raw["encoding"], raw["bytes"], raw["shown_bytes"]) == (encoding, len(data), len(data))
    assert raw["sha256"] == hashlib.sha256(data).hexdigest()
    assert (raw["data"].encode() if encoding == "utf-8" else base64.b64decode(raw["data"])) == data
    assert (shown["job"], shown["task"], shown["events"]) == (None, None, [])
    refused = problem(await client.post(f"{LETTERS}/{letter['id']}/redrive"), 409, "illegal-move")
    assert "discard" in refused["detail"]
    assert (await client.post(f"{LETTERS}/{letter['id']}/discard")).json() == {"id": letter["id"], "discarded": 1}
    problem(await client.post(f"{LETTERS}/{letter['id']}/discard"), 404, "dead-letter-not-found")


async def test_a_large_message_is_shown_in_part(client: httpx.AsyncClient, core: Core) -> None:
    whole = "\N{SNOWMAN}".encode() * 400_000
    await core.letters.store(DeadLetter(None, 0, "malformed", "not a task", whole))
    (entry,) = (await client.get(LETTERS)).json()["dead_letters"]
    assert entry["payload_bytes"] == len(whole)
    raw = (await client.get(f"{LETTERS}/{entry['id']}")).json()["raw"]
    assert (raw["encoding"], raw["bytes"], raw["sha256"]) == ("utf-8", len(whole), hashlib.sha256(whole).hexdigest())
    # 64 KiB end in the middle of a character.
    assert raw["shown_bytes"] == len(raw["data"].encode()) == 65_535


async def test_what_another_program_has_put_there_is_shown_too(client: httpx.AsyncClient, core: Core) -> None:
    await core.connection.client.jetstream().publish(f"{core.settings.dlq_subject_prefix}.theirs", b"hello")
    (entry,) = (await client.get(LETTERS)).json()["dead_letters"]
    assert (entry["id"], entry["reason"]) == ("letter_1", "foreign")
    assert (await client.get(f"{LETTERS}/letter_1")).json()["raw"]["data"] == "hello"


async def test_many_by_a_filter(client: httpx.AsyncClient, core: Core, tools: Toolbox) -> None:
    job_id = (await dead_job(client, core, tools))["job_id"]
    await malformed(client, core, tools, b"nonsense")
    listed = (await client.get(LETTERS, params={"tool_name": "boom"})).json()["dead_letters"]
    assert [entry["id"] for entry in listed] == [job_id]
    assert (await client.get(LETTERS, params={"older_than": "2020-01-01T00:00:00Z"})).json()["dead_letters"] == []

    for body in ({}, {"limit": 0}, {"limit": 1, "older": "x"}, {"limit": 1, "older_than": "yesterday"}):
        problem(await client.post(f"{LETTERS}/redrive", json=body), 422, "invalid-request")
    plan = (await client.post(f"{LETTERS}/redrive", json={"limit": 10, "dry_run": True})).json()
    assert (plan["matched"], plan["ids"], plan["done"], plan["dry_run"]) == (1, [job_id], 0, True)
    bad = (await client.post(f"{LETTERS}/redrive", json={"limit": 10, "reason": "malformed"})).json()
    assert (bad["matched"], bad["done"]) == (1, 0)
    assert "is no job" in bad["failed"][0]["why"]
    done = (await client.post(f"{LETTERS}/redrive", json={"limit": 10, "tool_name": "boom"}, headers=USER)).json()
    assert (done["matched"], done["done"], done["ids"], done["failed"]) == (1, 1, [job_id], [])
    await in_status(client, job_id, "queued")
    gone = (await client.post(f"{LETTERS}/discard", json={"limit": 10})).json()
    assert (gone["matched"], gone["done"]) == (1, 1)
    assert (await client.get(LETTERS)).json() == {"dead_letters": [], "cursor": None}


async def test_who_asks_must_be_a_name(client: httpx.AsyncClient) -> None:
    bad = {"X-Toolfleet-User": "a" * 200}
    problem(await client.post(f"{LETTERS}/letter_1/redrive", headers=bad), 422, "invalid-request")
    for letter_id in ("letter_1", "letter_", "letter_x", "nonsense", "letter_" + "9" * 30):
        problem(await client.get(f"{LETTERS}/{letter_id}"), 404, "dead-letter-not-found")


async def test_a_cancelled_job_gives_what_it_has_and_what_is_missing(
    client: httpx.AsyncClient, core: Core, tools: Toolbox
) -> None:
    job = await submit(client, call("echo", n=1), call("hold"), call("hold"))
    async with running_worker(core.settings, tools):
        await wait_until(lambda: tools.calls["hold"] == 2, "both calls run")
        await client.post(job["cancel_url"])
        await ended(client, job["job_id"])
        results = (await client.get(job["result_url"])).json()["results"]
        assert [entry["status"] for entry in results] == ["completed", "no_result", "no_result"]
        assert results[0]["structured_content"] == {"n": 1}
        tools.release.set()
        await client.post(f"{job['poll_url']}/retry", headers=USER)
        assert (await ended(client, job["job_id"]))["status"] == "completed"
    assert tools.calls == {"echo": 1, "hold": 4}


@pytest.mark.usefixtures("worker")
async def test_decisions_are_told_while_others_are_missing(client: httpx.AsyncClient) -> None:
    job = await submit(client, call("lost"), call("lost"))
    assert (await ended(client, job["job_id"]))["status"] == "unknown"
    listed = (await client.get(JOBS, params={"status": "unknown"})).json()["jobs"]
    assert [(entry["job_id"], entry["undecided_calls"]) for entry in listed] == [(job["job_id"], ["call_1", "call_2"])]
    decision = {"tool_call_id": "call_1", "decision": "failed", "note": "it never arrived"}
    told = (await client.post(f"{job['poll_url']}/resolve", json=decision, headers=USER)).json()
    assert (told["status"], told["undecided_calls"]) == ("unknown", ["call_2"])
    (one,) = told["decisions"]
    assert one.pop("decided_at").endswith("Z")
    assert one == {"tool_call_id": "call_1", "decision": "failed", "by": "alice", "note": "it never arrived"}
    problem(await client.post(f"{job['poll_url']}/resolve", json=decision), 409, "illegal-move")
    last = {"tool_call_id": "call_2", "decision": "completed"}
    told = (await client.post(f"{job['poll_url']}/resolve", json=last)).json()
    assert (told["status"], told["decisions"]) == ("failed", [])
    opened = next(event for event in told["recent_events"] if event["data"].get("reason") == "resolved")
    assert [(d["tool_call_id"], d["by"]) for d in opened["data"]["decisions"]] == [("call_1", "alice"), ("call_2", "")]


@pytest.mark.parametrize("path", [JOBS, f"{JOBS}/job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB/cancel", f"{LETTERS}/redrive"])
async def test_an_unknown_query_parameter_is_refused_where_something_is_changed(
    client: httpx.AsyncClient, path: str
) -> None:
    problem(await client.post(path, params={"dryrun": "1"}, json={}), 422, "invalid-request")
    problem(await client.get("/health/live", params={"verbose": "1"}), 422, "invalid-request")
