"""`toolfleet demo`: the whole of it on real parts, seen from a client, and nothing left behind."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console

from toolfleet.cli.client import JobsClient
from toolfleet.cli.exits import OK, CliError
from toolfleet.cli.output import draw_table, out
from toolfleet.cli.programs import Program
from toolfleet.cli.signals import StopSignals
from toolfleet.cli.sse import ServerEvent
from toolfleet.cli.stack import Part, Stack, StackPlan
from toolfleet.cli.watching import Bars, Follower, Lines, follow
from toolfleet.services.embedded.errors import EmbeddedServerError
from toolfleet.services.web_tools.demo_site import ARTICLES_PER_SECTION, DEMO_SECTIONS, demo_pages, serve_demo_site
from toolfleet.settings import variable_names

PAGE_LATENCY_S: Final = 0.2
"""Of the demo site: slow enough for bars that can be seen to move."""
PAGES_PER_CALL: Final = ARTICLES_PER_SECTION + 1
BLAME_S: Final = 0.3
WIDTH: Final = 110
"""Of the tables where stdout is no terminal."""

_NAMES: Final = {section.path.strip("/"): section.title for section in DEMO_SECTIONS}
"""The ids of the calls, and what their bars are called."""


def demo() -> int:
    """Run it; 0 where all four crawls came back with pages.

    Raises:
        CliError: something failed, or a signal came; everything has been stopped and removed by then.
    """
    return asyncio.run(_guarded())


async def _guarded() -> int:
    with StopSignals() as signals:
        try:
            return await signals.unless_asked(_demo())
        except EmbeddedServerError as error:
            raise CliError(str(error)) from error


async def _demo() -> int:
    console = out()
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    steps = _Steps(console)
    folder = Path(tempfile.mkdtemp(prefix="toolfleet-demo-"))
    try:
        # Whatever is set on this machine, the demo shows the same thing.
        env = dict.fromkeys(variable_names()) | {"TOOLFLEET_LOG_FORMAT": "console"}
        stack = Stack(StackPlan(folder, api_port=0, worker_grace_s=5, env=env), steps.done)
        try:
            await stack.start()
            async with serve_demo_site(latency_s=PAGE_LATENCY_S) as site:
                steps.done(f"demo site of {len(demo_pages())} pages")
                result = await _while_all_live(stack, _crawl(stack, site, console, steps))
            await stack.stop_idle()
        finally:
            await stack.kill()
    finally:
        shutil.rmtree(folder)
    steps.done("everything stopped and removed")
    _report(console, result, steps)
    return OK


async def _while_all_live(stack: Stack, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives; a part that ends meanwhile fails the demo with its last words."""
    job = asyncio.ensure_future(work)
    ends = {asyncio.ensure_future(part.wait()): part for part in stack.parts}
    try:
        await asyncio.wait({job, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if job.done() and job.exception() is not None:
            # What the client saw may be nothing but the end of a part, which is about to be known.
            await asyncio.wait(ends, timeout=BLAME_S, return_when=asyncio.FIRST_COMPLETED)
        for end, part in ends.items():
            if end.done():
                raise CliError(_last_words(part))
        return job.result()
    finally:
        for task in (job, *ends):
            task.cancel()
        await asyncio.gather(job, *ends, return_exceptions=True)


def _last_words(part: Part) -> str:
    if isinstance(part, Program):
        return part.obituary()
    tail = "\n".join(part.log_path.read_text(errors="replace").splitlines()[-15:])
    return f"{part.name} ended. The end of its log:\n{tail}"


async def _crawl(stack: Stack, site: str, console: Console, steps: _Steps) -> dict[str, Any]:
    """Submit, follow and read the result, over HTTP as any client does.

    Raises:
        CliError: a call did not come back with pages.
    """
    calls = [
        {
            "tool_call_id": section.path.strip("/"),
            "tool_name": "web_crawl",
            "tool_args": {"url": section.url(site), "max_pages": PAGES_PER_CALL},
        }
        for section in DEMO_SECTIONS
    ]
    async with JobsClient(stack.api_url) as client:
        job_id = (await client.submit({"tools": calls, "priority": "normal"}))["job_id"]
        steps.done(f"job accepted: {job_id}, four web_crawl calls on {site}")
        follower: Follower = Bars(console, _NAMES) if console.is_terminal else Lines(console)
        await follow(client, job_id, _Timed(follower, steps))
        steps.done("four sites crawled")
        _, result = await client.result(job_id)
        steps.done("results read")
    for call in result["results"]:
        if call["status"] != "completed" or not call["structured_content"]["pages"]:
            why = (call["error"] or {}).get("message") or f"it is {call['status']}"
            raise CliError(f"call {call['tool_call_id']} found nothing: {why}. {stack.tools.last_words()}")
    return result


class _Steps:
    """What was done, and how long each step took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = self._last = time.monotonic()
        self.rows: list[tuple[str, str]] = []

    def done(self, what: str) -> None:
        """The step that ends now."""
        now = time.monotonic()
        self.rows.append((what, f"{now - self._last:.2f} s"))
        self._console.print(f"{now - self._began:5.2f} s  {what}", markup=False, soft_wrap=True)
        self._last = now

    @property
    def total(self) -> str:
        """All of them together."""
        return f"{self._last - self._began:.2f} s"


class _Timed:
    """A follower that notes when a worker has taken the job."""

    def __init__(self, follower: Follower, steps: _Steps) -> None:
        self._follower = follower
        self._steps = steps

    def __enter__(self) -> Self:
        self._follower.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._follower.__exit__(kind, error, traceback)

    def show(self, event: ServerEvent) -> None:
        """Show it, and end a step with it."""
        if event.event == "job.started":
            self._steps.done(f"taken by {event.data.get('worker')}")
        self._follower.show(event)


def _report(console: Console, result: Mapping[str, Any], steps: _Steps) -> None:
    console.print()
    draw_table(
        console,
        ("call", "pages>", "words>", "skipped>", "took>", "title of the first page", "last page"),
        (_found(call) for call in result["results"]),
    )
    console.print()
    draw_table(console, ("step", "took>"), [*steps.rows, ("all of it", steps.total)])


def _found(call: Mapping[str, Any]) -> tuple[object, ...]:
    content = call["structured_content"]
    totals, pages = content["totals"], content["pages"]
    took = f"{call['duration_ms'] / 1000:.2f} s"
    return (
        call["tool_call_id"],
        totals["pages"],
        totals["words"],
        totals["skipped"],
        took,
        pages[0]["title"],
        pages[-1]["title"],
    )
