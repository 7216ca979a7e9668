"""How far a cancel gets with one call, as the runner tells it: what has stopped is said, never assumed (G8)."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from tests.tool_execution.conftest import OpenTools, StartHttp
from tests.tool_execution.harness import Caller, Notes, old_stdio, peer, spec_of, stdio_toolbox, text
from tests.tool_execution.raw_http import Exchange, raw_server
from toolfleet.services.background_jobs.task_models import ToolResult
from toolfleet.services.background_jobs.transitions import CallStop
from toolfleet.services.discovery.models import McpServer

STOPPED, TOLD, NOT_TOLD = CallStop.STOPPED, CallStop.TOLD, CallStop.NOT_TOLD


async def cancelled(call: Caller, running: asyncio.Task[ToolResult]) -> CallStop:
    """Cancel a call; the state that was told last."""
    running.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await running
    return call.stops[-1]


@pytest.mark.promise("G8")
async def test_a_tool_that_stops_was_at_least_told(call: Caller, notes: Notes) -> None:
    running = asyncio.create_task(call("hang", label="x"))
    await notes.until("started", "x")
    state = await cancelled(call, running)
    await notes.until("cancelled", "x")
    # Only the end of an older HTTP response can be seen by us: the newest protocol closes it to tell, and over stdio a
    # cancelled request stays without an answer, or gets an error at once.
    assert state in (STOPPED, TOLD)
    assert text(await call("echo", text="on")) == "on"


@pytest.mark.promise("G8")
async def test_a_tool_that_ignores_the_cancel_is_not_said_to_have_stopped(
    call: Caller, notes: Notes, tmp_path: Path
) -> None:
    running = asyncio.create_task(call("stubborn", label="x", path=str(tmp_path / "end")))
    await notes.until("started", "x")
    assert await cancelled(call, running) is TOLD
    assert not notes.entries("ended", "x")
    assert text(await call("echo", text="on")) == "on", "the session goes on"
    (tmp_path / "end").touch()
    await notes.until("ended", "x")


@pytest.mark.promise("G8")
@pytest.mark.parametrize(("manner", "state"), [("dies", STOPPED), ("late", STOPPED), ("silent", TOLD)])
async def test_a_server_that_ends_or_answers_all_the_same_has_stopped(
    open_tools: OpenTools, manner: str, state: CallStop
) -> None:
    call = Caller(await open_tools(old_stdio(manner)))
    running = asyncio.create_task(call.run(spec_of("old", "hold")))
    await wait_until(lambda: call.progress, "the server has the call")
    assert await cancelled(call, running) is state


@pytest.mark.promise("G8")
@pytest.mark.parametrize("old", [False, True], ids=["http", "http-old"])
async def test_a_server_that_is_stopped_could_not_be_told(
    start_http: StartHttp, open_tools: OpenTools, notes: Notes, old: bool
) -> None:
    http = await start_http(peer("python") if old else sys.executable)
    call = Caller(await open_tools(McpServer("toolbox", url=http.url)))
    running = asyncio.create_task(call("hang", label="x"))
    await notes.until("started", "x")
    http.signal(signal.SIGSTOP)
    state = await cancelled(call, running)
    http.signal(signal.SIGCONT)
    # To close a connection is how the newest protocol tells: the kernel takes that for a server that is stopped. A
    # notification is told when it was answered.
    assert state is (NOT_TOLD if old else TOLD)
    await notes.until("cancelled", "x")


@pytest.mark.promise("G5")
async def test_a_call_that_waits_for_a_connection_was_not_sent(open_tools: OpenTools) -> None:
    taken = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        taken.set()
        await asyncio.Event().wait()

    async with raw_server(answer) as server:
        call = Caller(await open_tools(McpServer("raw", url=server.url), mcp_max_connections=1))
        first = asyncio.create_task(call.run(spec_of("raw", "x")))
        await taken.wait()
        second = asyncio.create_task(call.run(spec_of("raw", "x")))
        await asyncio.wait({second}, timeout=0.2)
        assert await cancelled(call, second) is CallStop.NOT_SENT
        assert len(server.calls) == 1
        assert await cancelled(call, first) is TOLD


async def test_a_stubborn_tool_leaves_nothing_behind_in_the_worker(
    open_tools: OpenTools, notes: Notes, tmp_path: Path
) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes)))
    await call("echo", text="open")
    before = asyncio.all_tasks()
    for number in range(5):
        running = asyncio.create_task(call("stubborn", label=str(number), path=str(tmp_path / "end")))
        await notes.until("started", str(number))
        assert await cancelled(call, running) is TOLD
    assert {task.get_name() for task in asyncio.all_tasks() - before} == set()
    (tmp_path / "end").touch()
