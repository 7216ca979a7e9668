"""An API and a worker as a process of their own, for clients that are not asynchronous.

``python -m tests.api.live_stack SETTINGS_JSON FD`` writes ``{"url": …, "jobs": {status: job_id}}`` to the file
descriptor once requests are answered, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

import httpx

from tests.api.harness import JOBS, Toolbox, call, ended, running_server, running_worker, submit
from toolfleet.settings import Settings


async def main(settings: Settings, ready: int) -> None:
    """Run until standard input ends."""
    tools = Toolbox()
    async with running_server(settings, tools) as (_, client), running_worker(settings, tools):
        jobs = await _jobs_of_each_kind(client)
        tools.release.set()
        os.write(ready, json.dumps({"url": str(client.base_url), "jobs": jobs}).encode() + b"\n")
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


if __name__ == "__main__":
    asyncio.run(main(Settings.model_validate_json(sys.argv[1]), int(sys.argv[2])))
