"""Figures, tools, workers, dead letters and health."""

from __future__ import annotations

import httpx
import pytest

from tests.api.harness import JOBS, Toolbox, call, ended, in_status, problem, running_api, submit
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_core
from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.task_models import TaskDefinition, ToolCall, new_job_id
from toolfleet.settings import Settings


async def test_stats_of_an_empty_fleet(client: httpx.AsyncClient, api_settings: Settings) -> None:
    idle = {"queued": 0, "running": 0, "oldest_age_seconds": 0, "in_queue": 0}

    def limited(share: float) -> dict[str, float]:
        limits = {"max_in_queue": api_settings.tier_max_jobs, "max_bytes": int(share * api_settings.stream_max_bytes)}
        return idle | limits

    assert (await client.get(f"{JOBS}/stats")).json() == {
        "tiers": {"high": limited(0.95), "normal": limited(0.9), "low": limited(0.8)},
        "totals": {"queued": 0, "running": 0, "completed": 0, "failed": 0, "cancelled": 0, "unknown": 0},
        "rates": {"finished_last_minute": 0, "finished_last_15_minutes": 0},
        "leases_lost": 0,
        "queue": {"messages": 0, "bytes": 0, "max_bytes": api_settings.stream_max_bytes},
        "dead_letters": {
            "count": 0,
            "bytes": 0,
            "max_bytes": api_settings.dlq_max_bytes,
            "oldest_at": None,
            "oldest_age_seconds": None,
        },
        "workers": {"total": 0, "by_tier": {"high": 0, "normal": 0, "low": 0}, "slots": 0, "in_flight": 0},
        "warnings": [],
    }


@pytest.mark.usefixtures("worker")
async def test_stats_count_what_waits_runs_and_ended(client: httpx.AsyncClient, tools: Toolbox) -> None:
    done = await submit(client, call("echo", n=1))
    await ended(client, done["job_id"])
    running = await submit(client, call("hold"))
    await in_status(client, running["job_id"], "running")
    for _ in range(3):
        await submit(client, call("echo", n=1), priority="low")
    stats = (await client.get(f"{JOBS}/stats")).json()
    assert stats["tiers"]["normal"]["running"] == 1
    assert stats["tiers"]["low"]["queued"] == 3
    assert stats["totals"] == {"queued": 3, "running": 1, "completed": 1, "failed": 0, "cancelled": 0, "unknown": 0}
    assert stats["rates"]["finished_last_minute"] == 1
    assert stats["workers"]["by_tier"] == {"high": 0, "normal": 1, "low": 0}
    # Nobody works on the low tier: a person should know.
    assert [warning for warning in stats["warnings"] if "tier low" in warning]
    tools.release.set()


async def test_tools_are_listed_with_their_schemas(client: httpx.AsyncClient, tools: Toolbox) -> None:
    listed = (await client.get("/api/v1/tools")).json()["tools"]
    assert [tool["name"] for tool in listed] == ["boom", "echo", "hold", "lost", "step"]
    echo = next(tool for tool in listed if tool["name"] == "echo")
    assert echo["input_schema"]["required"] == ["n"]
    assert echo["repeatable"] is True
    assert next(tool for tool in listed if tool["name"] == "lost")["repeatable"] is False


@pytest.mark.usefixtures("worker")
async def test_workers_are_listed_while_they_are_there(client: httpx.AsyncClient) -> None:
    async def listed() -> list[dict[str, object]]:
        workers: list[dict[str, object]] = (await client.get("/api/v1/workers")).json()["workers"]
        return workers

    await wait_until(listed, "the worker has told that it is there")
    (worker,) = await listed()
    assert worker["tier"] == "normal"
    assert worker["state"] == "running"
    assert worker["slots"] == 20


def _letter(payload: bytes, fence: int, job_id: str | None) -> DeadLetter:
    return DeadLetter(job_id=job_id, fence=fence, reason="too_many_starts", message="it was", payload=payload)


async def test_dead_letters_are_paged_from_the_oldest(client: httpx.AsyncClient, api_settings: Settings) -> None:
    task = TaskDefinition(job_id=new_job_id(), tools=(ToolCall(tool_call_id="call_1", tool_name="echo"),))
    async with open_core(api_settings, name="test") as core:
        for number in (1, 2):
            again = task.model_copy(update={"generation": number})
            await core.letters.store(_letter(again.to_json(), number, task.job_id))
        await core.letters.store(_letter(b"\xff not a task", 0, None))
    first = (await client.get("/api/v1/dead-letters", params={"limit": 2})).json()
    rest = (await client.get("/api/v1/dead-letters", params={"limit": 2, "cursor": first["cursor"]})).json()
    letters = first["dead_letters"] + rest["dead_letters"]
    assert rest["cursor"] is None
    assert [(x["job_id"], x["attempt"], x["tools"]) for x in letters] == [
        (task.job_id, 1, ["echo"]),
        (task.job_id, 2, ["echo"]),
        (None, 0, []),
    ]
    assert letters[2]["payload_bytes"] == 12
    stats = (await client.get(f"{JOBS}/stats")).json()
    assert stats["dead_letters"]["count"] == 3
    assert stats["dead_letters"]["oldest_at"] == letters[0]["at"]


async def test_a_dead_letter_stream_that_is_80_percent_full_is_warned_of(
    client: httpx.AsyncClient, api_settings: Settings
) -> None:
    async def warned() -> bool:
        return any("toolfleet dlq list" in text for text in (await client.get(f"{JOBS}/stats")).json()["warnings"])

    part = b"x" * (api_settings.dlq_max_bytes * 42 // 100)
    async with open_core(api_settings, name="test") as core:
        await core.letters.store(_letter(part, 1, new_job_id()))
        assert not await warned()
        await core.letters.store(_letter(part, 2, new_job_id()))
    assert await warned()


async def test_health(client: httpx.AsyncClient) -> None:
    live = await client.get("/health/live")
    assert (live.status_code, live.json()["status"]) == (200, "alive")
    ready = await client.get("/health/ready")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ready", "parts": dict.fromkeys(("nats", "streams", "redis", "tools"), "up")}


async def test_a_stream_that_was_deleted_is_named_as_down(own_settings: Settings, tools: Toolbox) -> None:
    async with running_api(own_settings, tools) as client, open_core(own_settings, name="test") as core:
        assert (await client.get("/health/ready")).status_code == 200
        await core.connection.request(f"$JS.API.STREAM.DELETE.{own_settings.stream}", b"", 2)
        body = problem(await client.get("/health/ready"), 503, "not-ready")
        assert body["down"] == ["streams"]
        assert own_settings.stream in body["parts"]["streams"]
        assert (await client.get("/health/live")).status_code == 200
