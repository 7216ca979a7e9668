"""What one job that floods with progress costs the others on its worker: `make bench-flood`.

Small jobs on one MCP server, with and without a job beside them whose tool, on another server, reports progress as
fast as it can; in turns, since other programs share the machine. The last line is one JSON object; exit code 1 where a
ratio is below the floor.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from benchmarks.__main__ import say
from benchmarks.measure import percentiles
from benchmarks.stack import Stack, child, quiet, servers
from toolfleet.bootstrap import open_service
from toolfleet.services.background_jobs import JobService, NewJob
from toolfleet.services.background_jobs.event_reader import Pulse
from toolfleet.services.background_jobs.task_models import EventType, Gap

FLOOR = 0.8
"""Of the small jobs' rate: a flood may cost the others a fifth."""
TOOLS = str(Path(__file__).with_name("flood_tools.py"))
SLOTS = 20
AT_ONCE = 8
"""Small jobs at once: enough to keep the worker busy, few enough that their latency means something."""
ENDLESS = 100_000_000
BOUND_S = 60


@contextlib.asynccontextmanager
async def tool_servers(way: str) -> AsyncIterator[dict[str, object]]:
    """Two servers, `quiet` and `noisy`, in the form of a client's configuration."""
    if way == "stdio":
        yield {name: {"command": sys.executable, "args": [TOOLS, "stdio"]} for name in ("quiet", "noisy")}
        return
    async with contextlib.AsyncExitStack() as stack:
        yield {
            name: {"url": f"http://127.0.0.1:{await stack.enter_async_context(_http_server())}/mcp"}
            for name in ("quiet", "noisy")
        }


@contextlib.asynccontextmanager
async def _http_server() -> AsyncIterator[int]:
    # An HTTP tool server runs elsewhere; here it shares the worker's cores, and only what they leave it.
    process = await asyncio.create_subprocess_exec(
        "nice", "-n", "19", sys.executable, TOOLS, "http", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(BOUND_S):
            words = (await process.stdout.readline()).split()
        yield int(words[1])
    finally:
        process.terminate()
        await process.wait()


async def small_jobs(service: JobService, count: int) -> tuple[float, list[float]]:
    """Jobs a second, and milliseconds from the submit call of each to its end."""
    new = NewJob.model_validate({"tools": [{"tool_name": "quiet/small", "tool_args": {"text": "x" * 200}}]})
    numbers, took = iter(range(count)), []

    async def one_by_one() -> None:
        for _ in numbers:
            asked = time.perf_counter()
            submission = await service.submit(new)
            await service.wait_until_over(submission.job_id)
            took.append((time.perf_counter() - asked) * 1000)

    started = time.perf_counter()
    async with asyncio.timeout(BOUND_S):
        await asyncio.gather(*(one_by_one() for _ in range(AT_ONCE)))
    return count / (time.perf_counter() - started), took


@contextlib.asynccontextmanager
async def flooding(service: JobService) -> AsyncIterator[dict[str, float]]:
    """A job that floods while the context is open; afterwards how many notifications a second were read."""
    new = NewJob.model_validate({"tools": [{"tool_name": "noisy/flood", "tool_args": {"count": ENDLESS}}]})
    job_id = (await service.submit(new)).job_id
    figures: dict[str, float] = {}
    await _progress(service, job_id)
    started, before = time.perf_counter(), await _progress(service, job_id)
    yield figures
    after = await _progress(service, job_id, above=before)
    figures["read_per_s"] = (after - before) / (time.perf_counter() - started)
    await service.cancel(job_id)
    async with asyncio.timeout(BOUND_S):
        await service.wait_until_over(job_id)


async def _progress(service: JobService, job_id: str, above: float = 0) -> float:
    """The next state that the job tells."""
    async with asyncio.timeout(BOUND_S), contextlib.aclosing(service.events(job_id)) as events:
        last = above
        async for event in events:
            if not isinstance(event, (Gap, Pulse)) and event.type is EventType.TOOL_PROGRESS:
                last = float(str(event.data["progress"]))
                if last > above and time.time() * 1000 - event.at < 1000:
                    return last
    raise RuntimeError(f"the flooding job {job_id} ended; look at its result")


async def compare(stack: Stack, way: str, rounds: int, jobs: int) -> dict[str, object]:
    """Rates in turns, with and without the flood."""
    calm, flooded, calm_ms, flooded_ms, read, cpu = [], [], [], [], [], []
    async with tool_servers(way) as found:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
            config.write(json.dumps({"mcpServers": found}))
            config.flush()
            arguments = ["--slots", str(SLOTS), "--nats", stack.nats_url, "--redis", stack.redis_url]
            arguments += ["--mcp-config", config.name]
            async with (
                child("benchmarks.worker", arguments, {}) as worker,
                open_service(stack.settings(mcp_config=config.name)) as wired,
            ):
                await small_jobs(wired.service, jobs // 2)
                for number in range(rounds):
                    rate, took = await small_jobs(wired.service, jobs)
                    calm.append(rate)
                    calm_ms += took
                    async with flooding(wired.service) as figures:
                        used, since = worker.cpu_s, time.perf_counter()
                        rate, took = await small_jobs(wired.service, jobs)
                        cpu.append((worker.cpu_s - used) / (time.perf_counter() - since))
                    flooded.append(rate)
                    flooded_ms += took
                    read.append(figures["read_per_s"])
                    say(
                        f"  {way} round {number + 1}: {calm[-1]:.0f} jobs/s, beside a flood {flooded[-1]:.0f} "
                        f"({read[-1]:.0f} notifications/s read)"
                    )
    return {
        "ratio": round(statistics.median(b / a for a, b in zip(calm, flooded, strict=True)), 2),
        "calm_per_s": round(statistics.median(calm)),
        "flooded_per_s": round(statistics.median(flooded)),
        "calm_ms": percentiles(calm_ms),
        "flooded_ms": percentiles(flooded_ms),
        "notifications_read_per_s": round(statistics.median(read)),
        "worker_cpu_share": round(statistics.median(cpu), 2),
    }


async def main(ways: list[str], rounds: int, jobs: int) -> int:
    """All that was asked for; the exit code."""
    say(f"{jobs} small jobs a round, {rounds} rounds in turns, one worker; the floor of the ratio is {FLOOR}")
    figures: dict[str, object] = {}
    met = True
    for way in ways:
        async with servers(durable=False) as stack:
            found = await compare(stack, way, rounds, jobs)
        figures[way] = found
        met &= float(str(found["ratio"])) >= FLOOR
        say(f"  {way}: ratio {found['ratio']}, {'met' if float(str(found['ratio'])) >= FLOOR else 'MISSED'}")
    say(json.dumps(figures))
    return 0 if met else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make bench-flood")
    parser.add_argument("--way", choices=["stdio", "http"], action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=300)
    options = parser.parse_args()
    quiet()
    sys.exit(uvloop.run(main(options.way or ["stdio", "http"], options.rounds, options.jobs)))
