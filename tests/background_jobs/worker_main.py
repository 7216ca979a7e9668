"""A worker process whose tools write what they do into a file, line by line, synced to the disk.

Run with one argument, JSON: ``{"settings": {…}, "tier": …, "ledger": path}``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from toolfleet.bootstrap import open_worker
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.tool_execution.local_runner import LocalToolRunner
from toolfleet.settings import Settings

POLL_S = 0.01


class Ledger:
    """One line an event: ``<what> <call> <attempt> <pid>``."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, what: str, context: CallContext) -> None:
        call = context.idempotency_key.partition(":")[2]
        os.write(self._file, f"{what} {call} {context.attempt} {os.getpid()}\n".encode())
        os.fsync(self._file)


def tools(ledger: Ledger) -> LocalToolRunner:
    """`note` writes two lines, `hold` waits for a file in between, `block` the same without ever awaiting, `die` kills
    the process in between."""

    async def note(args: dict[str, Any], context: CallContext) -> str:
        ledger.write("begin", context)
        ledger.write("end", context)
        return "noted"

    async def hold(args: dict[str, Any], context: CallContext) -> str:
        ledger.write("begin", context)
        try:
            while not Path(args["until"]).exists():
                await asyncio.sleep(POLL_S)
        except asyncio.CancelledError:
            ledger.write("stopped", context)
            raise
        ledger.write("end", context)
        return "held"

    async def block(args: dict[str, Any], context: CallContext) -> str:
        ledger.write("begin", context)
        until = Path(args["until"])
        while not until.exists():
            time.sleep(POLL_S)
        ledger.write("end", context)
        return "blocked"

    async def die(args: dict[str, Any], context: CallContext) -> str:
        ledger.write("begin", context)
        os.kill(os.getpid(), signal.SIGKILL)
        return "never"

    named = {function.__name__: function for function in (note, hold, block, die)}
    once = {f"once_{name}": function for name, function in named.items()}
    return LocalToolRunner(
        {
            name: (ToolSpec(name, "local", name, repeatable=name in named), function)
            for name, function in (named | once).items()
        }
    )


async def main(told: dict[str, Any]) -> int:
    settings = Settings.model_validate(told["settings"])
    runner = tools(Ledger(Path(told["ledger"])))
    async with open_worker(settings, Tier(told["tier"]), tools=runner) as worker:
        return await worker.run()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(json.loads(sys.argv[1]))))
