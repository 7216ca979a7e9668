"""A worker process: with in-process tools, where the queue is measured, or with the tools of MCP servers."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

import uvloop

from benchmarks.stack import quiet
from toolfleet.bootstrap import open_worker
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.telemetry.gc_tuning import settle
from toolfleet.services.tool_execution.local_runner import LocalToolRunner
from toolfleet.settings import Settings

ANSWER = "r" * 200


async def noop(_args: dict[str, Any], _context: CallContext) -> str:
    """200 B result."""
    return ANSWER


async def stamp(_args: dict[str, Any], _context: CallContext) -> dict[str, Any]:
    """When its first line ran: CLOCK_MONOTONIC is one clock for all processes of a machine."""
    return {"at_ns": time.monotonic_ns()}


async def nap(args: dict[str, Any], _context: CallContext) -> str:
    """Sleeps."""
    await asyncio.sleep(args["seconds"])
    return ANSWER


async def chat(args: dict[str, Any], context: CallContext) -> str:
    """Reports progress so many times, with a pause (seconds) after each."""
    for step in range(args["count"]):
        context.on_progress(step + 1, args["count"], None)
        await asyncio.sleep(args["pause"])
    return ANSWER


def tools() -> LocalToolRunner:
    """The tools by name; all may run again."""
    functions = {"noop": noop, "stamp": stamp, "nap": nap, "chat": chat}
    return LocalToolRunner(
        {name: (ToolSpec(name, "local", name, repeatable=True), function) for name, function in functions.items()}
    )


async def run(slots: int, nats_url: str, redis_url: str, mcp_config: str | None) -> int:
    """Work until SIGTERM."""
    settings = Settings.model_validate(
        {"nats_url": nats_url, "redis_url": redis_url, "concurrency": slots, "log_level": "error",
         "mcp_config": mcp_config, "progress_interval": 0.02}
    )  # fmt: skip
    quiet()
    settle()
    async with open_worker(settings, Tier.NORMAL, tools=None if mcp_config else tools()) as worker:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        return await worker.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--mcp-config", help="servers whose tools are run, in place of the in-process ones")
    options = parser.parse_args()
    sys.exit(uvloop.run(run(options.slots, options.nats, options.redis, options.mcp_config)))
