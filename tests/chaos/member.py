"""A worker or an API whose tools are functions of its own process: up in a second, for scenarios of one fault.

``python -m tests.chaos.member JSON``, usually by `tests.chaos.woven`; the JSON is ``{"role": "worker" | "api",
"settings": {…}, "effects": path, "ready": path}``. An API writes its port into the file `ready`, a worker its status.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import uvloop

from tests.chaos.ledger import SyncedFile
from toolfleet.services.background_jobs.errors import ToolServerFailed
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.tool_execution.local_runner import LocalToolRunner
from toolfleet.settings import Settings

POLL_S = 0.01


def local_tools(effects: Path) -> LocalToolRunner:
    """``own/work``, ``own/die`` and ``own/fail``, each with a twin ``own/once_…`` that must not run twice.

    All write their effects as `tests.chaos.tool_server` does. `work` takes ``ms`` and waits for the file ``until``, if
    it is told one, from attempt ``since`` on; `die` kills its process; `fail` breaks in its first ``times`` attempts.
    """
    ledger = SyncedFile(effects)

    def note(context: CallContext, what: str) -> None:
        job_id, _, call = context.idempotency_key.partition(":")
        ledger.write(
            {"job": job_id, "call": call, "attempt": context.attempt, "what": what, "server": "own", "pid": os.getpid()}
        )

    async def work(args: dict[str, Any], context: CallContext) -> str:
        note(context, "begin")
        if "ms" in args:
            # Otherwise nothing else of the process has its turn between the call and its end.
            await asyncio.sleep(args["ms"] / 1000)
        while "until" in args and context.attempt >= args.get("since", 1) and not Path(args["until"]).exists():
            await asyncio.sleep(POLL_S)
        note(context, "end")
        return "worked"

    async def die(args: dict[str, Any], context: CallContext) -> str:
        note(context, "begin")
        os.kill(os.getpid(), signal.SIGKILL)
        return "never"

    async def fail(args: dict[str, Any], context: CallContext) -> str:
        note(context, "begin")
        if context.attempt <= args.get("times", 1000):
            raise ToolServerFailed("as it was told")
        return "at last"

    named = {function.__name__: function for function in (work, die, fail)}
    once = {f"once_{name}": function for name, function in named.items()}
    return LocalToolRunner(
        {
            f"own/{name}": (ToolSpec(f"own/{name}", "own", name, repeatable=name in named), function)
            for name, function in (named | once).items()
        }
    )


async def be_worker(settings: Settings, tools: LocalToolRunner, ready: Path) -> int:
    """Until it is told to leave; the exit code."""
    from toolfleet.bootstrap import open_worker  # late, as below: a worker does not pay for what an API imports

    async with open_worker(settings, Tier.NORMAL, tools=tools, status_file=ready) as worker:
        return await worker.run()


async def be_api(settings: Settings, tools: LocalToolRunner, ready: Path) -> int:
    """Until it is told to leave; 0."""
    from toolfleet.api.serve import ApiServer

    server = ApiServer(settings, port=0, tools=tools, ready=lambda port: say(ready, str(port)))
    await server.run(handle_signals=True)
    return 0


def say(ready: Path, text: str) -> None:
    """Whole, or not at all: somebody waits for the file."""
    draft = ready.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(ready)


def main() -> int:
    """Be what the JSON says."""
    told = json.loads(sys.argv[1])
    role = {"worker": be_worker, "api": be_api}[told["role"]]
    tools = local_tools(Path(told["effects"]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(role(Settings.model_validate(told["settings"]), tools, Path(told["ready"])))


if __name__ == "__main__":
    sys.exit(main())
