"""An API and a worker as a process of their own, for clients that are not asynchronous.

``python -m tests.api.live_stack SETTINGS_JSON FD`` writes ``{"url": …, "jobs": {status: job_id}, "letters": [id]}`` to
the file descriptor once requests are answered, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

import httpx

from tests.api.harness import JOBS, Toolbox, call, ended, running_server, running_worker, submit
from toolfleet.bootstrap import open_core
from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.task_models import TaskDefinition, ToolCall, new_job_id
from toolfleet.settings import Settings


async def main(settings: Settings, ready: int) -> None:
    """Run until standard input ends."""
    tools = Toolbox()
    async with running_server(settings, tools) as (_, client), running_worker(settings, tools):
        jobs = await _jobs_of_each_kind(client)
        letters = await _letters(settings, jobs)
        tools.release.set()
        os.write(ready, json.dumps({"url": str(client.base_url), "jobs": jobs, "letters": letters}).encode() + b"\n")
        await asyncio.to_thread(sys.stdin.read)


async def _jobs_of_each_kind(client: httpx.AsyncClient) -> dict[str, str]:
    """The id of an ended job of each terminal status."""
    ids = {
        "completed": (await submit(client, call("echo", n=1)))["job_id"],
        "failed": (await submit(client, call("boom"), max_retries=0))["job_id"],
        "unknown": (await submit(client, call("lost")))["job_id"],
        "cancelled": (await submit(client, call("hold")))["job_id"],
    }
    await client.post(f"{JOBS}/{ids['cancelled']}/cancel")
    for status, job_id in ids.items():
        assert (await ended(client, job_id))["status"] == status
    return ids


async def _letters(settings: Settings, jobs: dict[str, str]) -> list[str]:
    """Ids of dead letters: some of the jobs, one of a job whose record is gone, and malformed messages."""
    async with open_core(settings, name="letters") as core:
        for job_id in (jobs["failed"], jobs["completed"], new_job_id()):
            task = TaskDefinition(job_id=job_id, tools=(ToolCall(tool_call_id="call_1", tool_name="echo"),))
            await core.letters.store(DeadLetter(job_id, 1, "too_many_starts", "its workers died", task.to_json()))
        for data in (b"nonsense", b"\xff\x00"):
            await core.letters.store(DeadLetter(None, 0, "malformed", "not a task", data, subject="some.where"))
        return [letter.letter_id for letter in (await core.letters.page(0, 10)).entries]


if __name__ == "__main__":
    asyncio.run(main(Settings.model_validate_json(sys.argv[1]), int(sys.argv[2])))
