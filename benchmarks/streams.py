"""The reading side: `make bench-streams`. 100 clients that lose their connections for a minute, then 2,000 idle ones.

The last line is one JSON object; exit code 1 where a client missed an event or saw one twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time

import redis.asyncio as redis
import uvloop

from benchmarks.__main__ import say
from benchmarks.stack import Stack, WorkerProcess, child, quiet, servers
from benchmarks.stream_client import Followed, connect, follow
from benchmarks.worker import tools
from toolfleet.api.serve import raise_open_files
from toolfleet.bootstrap import open_service
from toolfleet.services.background_jobs import JobService, NewJob

CHAT = {"tools": [{"tool_name": "chat", "tool_args": {"count": 100, "pause": 0.03}}]}
"""About 3 s and 100 events."""
JOBS_AT_ONCE = 20
DROP_AFTER = (1, 40)
"""Frames of one connection."""
KILL_S = 0.5
"""Between two cuts of the API's Pub/Sub connection."""
JOBS_WATCHED = 200
SETTLE_S = 3.0
BOUND_S = 60


async def storm(stack: Stack, port: int, clients: int, seconds: float, seed: int, *, gaps: bool) -> dict[str, object]:
    """Clients that follow one job after the other, until the time is up."""
    chance = random.Random(seed)
    until = time.monotonic() + seconds
    jobs: list[str] = []
    followed: list[Followed] = []

    async def submitting(service: JobService) -> None:
        while time.monotonic() < until:
            jobs.append((await service.submit(NewJob.model_validate(CHAT))).job_id)
            await asyncio.sleep(3.5 / JOBS_AT_ONCE)

    async def client(own: random.Random) -> None:
        while time.monotonic() < until:
            if not jobs:
                await asyncio.sleep(0.05)
                continue
            followed.append(await follow(port, own.choice(jobs[-JOBS_AT_ONCE:]), own, DROP_AFTER))

    async with open_service(stack.settings(), tools=tools()) as wired:
        cutting = asyncio.create_task(cut_pubsub(stack)) if gaps else None
        try:
            async with asyncio.timeout(seconds + BOUND_S), asyncio.TaskGroup() as group:
                group.create_task(submitting(wired.service))
                for _ in range(clients):
                    group.create_task(client(random.Random(chance.random())))
        finally:
            if cutting is not None:
                cutting.cancel()
    problems = [problem for one in followed for problem in one.problems()]
    for problem in problems[:10]:
        say(f"  {problem}")
    return {
        "seed": seed,
        "jobs": len(jobs),
        "followed": len(followed),
        "connections": sum(one.connections for one in followed),
        "events": sum(len(one.ids) for one in followed),
        "problems": len(problems),
    }


async def cut_pubsub(stack: Stack) -> None:
    """Cut every Pub/Sub connection again and again, until cancelled."""
    async with redis.from_url(stack.redis_url) as client:
        while True:
            await asyncio.sleep(KILL_S)
            await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


async def idle(stack: Stack, port: int, api: WorkerProcess, clients: int, seconds: float) -> dict[str, object]:
    """Clients that watch jobs which wait; then all jobs are cancelled, and each client is to hear of it."""
    async with open_service(stack.settings(), tools=tools()) as wired:
        new = NewJob.model_validate(CHAT | {"priority": "low"})  # no worker of this tier is there
        jobs = [(await wired.service.submit(new)).job_id for _ in range(JOBS_WATCHED)]
        await _told(port, jobs[0], wired.service)
        jobs[0] = (await wired.service.submit(new)).job_id
        await asyncio.sleep(SETTLE_S)
        before = api.rss_mb
        streams = []
        for number in range(clients):
            status, reader, writer = await connect(port, jobs[number % len(jobs)], None)
            if status != 200:
                raise RuntimeError(f"client {number} was answered {status}")
            await reader.readuntil(b"\n\n")
            streams.append((reader, writer))
        await asyncio.sleep(SETTLE_S)
        used, since, rss = api.cpu_s, time.perf_counter(), api.rss_mb
        await asyncio.sleep(seconds)
        share = (api.cpu_s - used) / (time.perf_counter() - since)
        pubsub = await _pubsub_connections(stack, api.pid)
        started = time.perf_counter()
        reading = [asyncio.create_task(_end_of(reader)) for reader, _ in streams]
        await asyncio.gather(*(wired.service.cancel(job_id) for job_id in jobs))
        async with asyncio.timeout(BOUND_S):
            delays = [ended - started for ended in await asyncio.gather(*reading)]
        for _, writer in streams:
            writer.transport.abort()
    return {
        "clients": clients,
        "kib_a_client": round((rss - before) * 1024 / clients, 1),
        "rss_mib": round(rss, 1),
        "cpu_share_idle": round(share, 3),
        "pubsub_connections": pubsub,
        "all_told_after_s": round(max(delays), 2),
        "told_p50_s": round(statistics.median(delays), 2),
    }


async def _told(port: int, job_id: str, service: JobService) -> None:
    """One stream from its beginning to its end: what a process does once is done then."""
    _, reader, writer = await connect(port, job_id, None)
    await service.cancel(job_id)
    await _end_of(reader)
    writer.transport.abort()


async def _end_of(reader: asyncio.StreamReader) -> float:
    """When the job was told to be cancelled.

    Raises:
        RuntimeError: the stream ended without a word.
    """
    while line := await reader.readline():
        if line.startswith(b"event: job.cancelled"):
            return time.perf_counter()
    raise RuntimeError("a stream ended without the job's end")


async def _pubsub_connections(stack: Stack, pid: int) -> int:
    async with redis.from_url(stack.redis_url, decode_responses=True) as client:
        listed = await client.client_list(_type="pubsub")
        return sum(one["name"] == f"toolfleet-{pid}" for one in listed)


async def main(options: argparse.Namespace) -> int:
    """All that was asked for; the exit code."""
    figures: dict[str, object] = {}
    broken = False
    async with servers(durable=False) as stack:
        text = json.dumps({"nats_url": stack.nats_url, "redis_url": stack.redis_url, "log_level": "error"})
        workers = ["--slots", "50", "--nats", stack.nats_url, "--redis", stack.redis_url]
        async with child("benchmarks.api", ["--settings", text], {}) as api, child("benchmarks.worker", workers, {}):
            port = int(await api.line())
            for name, gaps in (("storm", False), ("storm_with_pubsub_gaps", True)):
                if options.seconds <= 0:
                    break
                say(f"{options.clients} clients that lose their connections for {options.seconds:g} s, "
                    f"seed {options.seed}" + (", and the API's Pub/Sub connection is cut" if gaps else ""))  # fmt: skip
                found = await storm(stack, port, options.clients, options.seconds, options.seed, gaps=gaps)
                figures[name] = found
                broken |= bool(found["problems"])
                say(f"  {json.dumps(found)}")
            if options.idle > 0:
                say(f"{options.idle} clients that watch jobs which wait, {options.idle_seconds:g} s")
                figures["idle"] = await idle(stack, port, api, options.idle, options.idle_seconds)
    say(json.dumps(figures))
    return 1 if broken else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make bench-streams")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--idle", type=int, default=2000)
    parser.add_argument("--idle-seconds", type=float, default=30)
    asked = parser.parse_args()
    quiet()
    raise_open_files()
    sys.exit(uvloop.run(main(asked)))
