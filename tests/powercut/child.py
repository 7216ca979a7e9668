"""A worker or an API of the machine whose power is cut: ``python -m tests.powercut.child JSON``.

The argument holds ``role`` (``worker`` or ``api``), ``settings``, ``ledger`` and ``ready``, a file that is written
when the process is: with its port where it is the API.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import uvloop

from tests.powercut.ledger import Ledger
from toolfleet import bootstrap
from toolfleet.api.serve import ApiServer
from toolfleet.services.background_jobs.ports import CallContext, Changes, Lease, RetryAnswer, ToolSpec, WriteAnswer
from toolfleet.services.background_jobs.redis_state_manager import RedisStateManager
from toolfleet.services.background_jobs.task_models import ErrorInfo, Tier, ToolResult
from toolfleet.services.background_jobs.transitions import Ending
from toolfleet.services.telemetry.logs import configure_logging
from toolfleet.services.tool_execution.local_runner import LocalToolRunner
from toolfleet.settings import Settings


def tools(ledger: Ledger) -> LocalToolRunner:
    """`note` answers at once, `nap` after a while, `fail` fails; ``once_…`` must not run twice."""

    def began(context: CallContext, once: bool) -> str:
        _, _, call = context.idempotency_key.partition(":")
        ledger.note("effect", context.job_id, call=call, once=once)
        return f"{context.job_id} {call} by attempt {context.attempt}"

    async def note(args: dict[str, Any], context: CallContext) -> str:
        return began(context, once=False)

    async def nap(args: dict[str, Any], context: CallContext) -> str:
        answer = began(context, once=False)
        await asyncio.sleep(args["seconds"])
        return answer

    async def once_note(args: dict[str, Any], context: CallContext) -> str:
        return began(context, once=True)

    async def once_nap(args: dict[str, Any], context: CallContext) -> str:
        answer = began(context, once=True)
        await asyncio.sleep(args["seconds"])
        return answer

    async def fail(args: dict[str, Any], context: CallContext) -> str:
        began(context, once=False)
        raise ValueError("as it was told")

    functions = {function.__name__: function for function in (note, nap, once_note, once_nap, fail)}
    return LocalToolRunner(
        {
            name: (ToolSpec(name, "local", name, repeatable=not name.startswith("once")), function)
            for name, function in functions.items()
        }
    )


class NotingStore(RedisStateManager):
    """Notes what Redis has answered 'ok' to: results and ends. No client could know of a write any earlier."""

    ledger: Ledger

    async def progress(self, lease: Lease, changes: Changes, wseq: int) -> WriteAnswer:
        answer = await super().progress(lease, changes, wseq)
        self._note(answer, lease, changes)
        return answer

    async def finish(self, lease: Lease, ending: Ending, changes: Changes) -> WriteAnswer:
        answer = await super().finish(lease, ending, changes)
        self._note(answer, lease, changes)
        if answer == "ok":
            self.ledger.note("seen", lease.job_id, status=ending.status.value, by="worker")
        return answer

    async def retry(self, lease: Lease, delay_ms: int, error: ErrorInfo, changes: Changes) -> RetryAnswer:
        answer = await super().retry(lease, delay_ms, error, changes)
        self._note(answer, lease, changes)
        return answer

    def _note(self, answer: str, lease: Lease, changes: Changes) -> None:
        if answer == "lost":
            return
        for result in changes.results:
            self.ledger.note("result", lease.job_id, call=result.tool_call_id, text=text_of(result))


def text_of(result: ToolResult) -> str:
    """What its tool has said; empty where it failed."""
    return str(result.content[0]["text"]) if result.content else ""


async def work(settings: Settings, runner: LocalToolRunner, ready: Path) -> int:
    """Work until the process is killed."""
    async with bootstrap.open_worker(settings, Tier.NORMAL, tools=runner) as worker:
        say(ready, "ready")
        return await worker.run()


async def serve(settings: Settings, runner: LocalToolRunner, ready: Path) -> int:
    """Serve until the process is killed."""
    await ApiServer(settings, port=0, ready=lambda port: say(ready, str(port)), tools=runner).run()
    return 0


def say(ready: Path, word: str) -> None:
    """Moved into place, so that nobody reads half of it."""
    fresh = ready.with_suffix(".new")
    fresh.write_text(word)
    fresh.replace(ready)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    read = Settings.model_validate(told["settings"])
    configure_logging(read)
    NotingStore.ledger = Ledger(Path(told["ledger"]))
    # The one seam: the composition root makes its store by this name.
    bootstrap.RedisStateManager = NotingStore  # type: ignore[attr-defined]
    role = work if told["role"] == "worker" else serve
    sys.exit(uvloop.run(role(read, tools(NotingStore.ledger), Path(told["ready"]))))
