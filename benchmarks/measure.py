"""What is measured, one function each. All return plain numbers."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Sequence

import redis.asyncio as redis

from benchmarks import floor
from benchmarks.stack import Stack, WorkerProcess, child
from benchmarks.worker import tools
from toolfleet.bootstrap import Wired, open_service
from toolfleet.services.background_jobs import JobService, NewJob
from toolfleet.services.background_jobs.redis_records import ROOTS

ARGUMENT = "a" * 200
IN_FLIGHT = 128
"""Submits at once: enough to keep the publish acks coming, as a busy API would."""
SLOTS = 100
LONGEST_S = 120
"""Of one run; a benchmark that hangs says so instead."""
POLL_S = 0.02
"""Between two looks at whether all is done: a hundredth of a run, and little work beside it."""


@contextlib.asynccontextmanager
async def workers(stack: Stack, count: int, slots: int = SLOTS) -> AsyncIterator[list[WorkerProcess]]:
    """Worker processes, ready."""
    async with contextlib.AsyncExitStack() as started:
        arguments = ["--slots", str(slots), "--nats", stack.nats_url, "--redis", stack.redis_url]
        yield [await started.enter_async_context(child("benchmarks.worker", arguments, {})) for _ in range(count)]


async def floor_rate(stack: Stack, jobs: int) -> float:
    """Jobs a second of the bare loop, from the first publish to the last stored result."""
    arguments = ["--slots", str(SLOTS), "--nats", stack.nats_url, "--redis", stack.redis_url]
    client = redis.from_url(stack.redis_url)
    await client.flushall()
    async with child("benchmarks.floor", arguments, {}):
        started = time.perf_counter()
        submitting = asyncio.create_task(floor.submit(stack.nats_url, jobs, IN_FLIGHT))
        async with asyncio.timeout(LONGEST_S):
            while await client.dbsize() < 2 * jobs:
                await asyncio.sleep(POLL_S)
        seconds = time.perf_counter() - started
        await submitting
    await client.aclose()
    return jobs / seconds


async def submit_many(service: JobService, new: NewJob, jobs: int) -> None:
    """Submit the same job many times, with many in flight."""
    numbers = iter(range(jobs))

    async def submitter() -> None:
        for _ in numbers:
            await service.submit(new)

    await asyncio.gather(*(submitter() for _ in range(IN_FLIGHT)))


async def completed(wired: Wired) -> int:
    """Jobs that have a stored result."""
    pipeline = wired.core.client.pipeline(transaction=False)
    for root in ROOTS:
        pipeline.hget(f"{root}:totals", "completed")
    return sum(int(answer or 0) for answer in await pipeline.execute())


async def fleet_seconds(wired: Wired, new: NewJob, jobs: int) -> float:
    """From the first submit to the last stored result."""
    before = await completed(wired)
    started = time.perf_counter()
    submitting = asyncio.create_task(submit_many(wired.service, new, jobs))
    async with asyncio.timeout(LONGEST_S):
        while await completed(wired) < before + jobs:
            if submitting.done() and submitting.exception() is not None:
                break
            await asyncio.sleep(POLL_S)
    seconds = time.perf_counter() - started
    await submitting
    return seconds


async def throughput(stack: Stack, jobs: int, count: int) -> tuple[float, float, float]:
    """Jobs a second with `count` workers, the first worker's memory in MiB after it, and its CPU in µs a job."""
    new = NewJob.model_validate({"tools": [{"tool_name": "noop", "tool_args": {"text": ARGUMENT}}]})
    async with workers(stack, count) as running, open_service(stack.settings(), tools=tools()) as wired:
        await fleet_seconds(wired, new, 200)
        cpu = running[0].cpu_s
        seconds = await fleet_seconds(wired, new, jobs)
        return jobs / seconds, running[0].rss_mb, (running[0].cpu_s - cpu) / jobs * count * 1e6


async def latency(stack: Stack, samples: int) -> tuple[list[float], list[float]]:
    """Milliseconds from the submit call to the tool's first line, and to the result in hand, on an idle queue."""
    new = NewJob.model_validate({"tools": [{"tool_name": "stamp"}]})
    starts, trips = [], []
    async with workers(stack, 1), open_service(stack.settings(), tools=tools()) as wired:
        for sample in range(samples + 20):
            asked = time.monotonic_ns()
            submission = await wired.service.submit(new)
            async with asyncio.timeout(10):
                record = await wired.service.wait_until_over(submission.job_id)
            results = await wired.service.results(record)
            answered = time.monotonic_ns()
            stamped = results["call_1"].structured_content
            assert isinstance(stamped, dict)
            if sample >= 20:  # the first ones warm both sides up
                starts.append((int(stamped["at_ns"]) - asked) / 1e6)
                trips.append((answered - asked) / 1e6)
    return starts, trips


async def sleepers(stack: Stack, jobs: int) -> float:
    """Seconds that many jobs of one second take on one worker with a slot for each."""
    new = NewJob.model_validate({"tools": [{"tool_name": "nap", "tool_args": {"seconds": 1.0}}]})
    async with workers(stack, 1, jobs), open_service(stack.settings(), tools=tools()) as wired:
        return await fleet_seconds(wired, new, jobs)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 2), "p95": round(cuts[94], 2), "p99": round(cuts[98], 2)}
