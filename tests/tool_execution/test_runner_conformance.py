"""One suite for every `ToolRunner`: functions of this process, and tools over MCP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.tool_execution.conftest import OpenTools
from tests.tool_execution.harness import JOB, Notes, Progress, stdio_toolbox
from toolfleet.services.background_jobs.errors import (
    LeaseLost,
    ResultTooLarge,
    ToolFailure,
    ToolServerFailed,
    ToolTimedOut,
    UnknownTool,
)
from toolfleet.services.background_jobs.ports import CallContext, ToolCatalogue, ToolRunner, ToolSpec
from toolfleet.services.background_jobs.task_models import ErrorInfo, ToolCall, ToolResult
from toolfleet.services.tool_execution.local_runner import LocalTool, LocalToolRunner

LIMIT = 100_000


async def echo(arguments: dict[str, Any], context: CallContext) -> str:
    return str(arguments["text"])


async def add(arguments: dict[str, Any], context: CallContext) -> dict[str, Any]:
    return {"sum": arguments["a"] + arguments["b"]}


async def refuse(arguments: dict[str, Any], context: CallContext) -> ToolResult:
    reason = str(arguments["reason"])
    error = ErrorInfo(code="tool_error", message=reason)
    content = ({"type": "text", "text": reason},)
    return ToolResult(tool_call_id="", tool_name="", status="failed", is_error=True, content=content, error=error)


async def steps(arguments: dict[str, Any], context: CallContext) -> str:
    for step in range(1, arguments["count"] + 1):
        context.on_progress(step, arguments["count"], f"step {step}")
    return "done"


async def big(arguments: dict[str, Any], context: CallContext) -> str:
    return "x" * int(arguments["size"])


def local_tools(notes: Notes) -> dict[str, tuple[ToolSpec, LocalTool]]:
    async def hang(arguments: dict[str, Any], context: CallContext) -> str:
        with notes.path.open("a") as file:
            file.write('{"event": "started"}\n')
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            with notes.path.open("a") as file:
                file.write('{"event": "cancelled"}\n')
            raise
        return "never"

    tools: dict[str, tuple[LocalTool, bool]] = {
        "echo": (echo, True),
        "add": (add, True),
        "refuse": (refuse, False),
        "steps": (steps, False),
        "big": (big, False),
        "hang": (hang, False),
    }
    return {
        name: (ToolSpec(name=name, server="local", tool=name, repeatable=repeatable), function)
        for name, (function, repeatable) in tools.items()
    }


class Both:
    """A runner and the catalogue beside it."""

    def __init__(self, runner: ToolRunner, catalogue: ToolCatalogue) -> None:
        self.runner = runner
        self.catalogue = catalogue
        self.progress: list[Progress] = []
        self.before_send: Callable[[], None] = lambda: None

    async def call(self, tool: str, timeout: float = 30, **arguments: Any) -> ToolResult:
        spec = await self.runner.describe(tool)
        context = CallContext(
            job_id=JOB,
            attempt=3,
            idempotency_key=f"{JOB}:c",
            timeout_s=timeout,
            on_progress=lambda *progress: self.progress.append(progress),
            before_send=self.before_send,
        )
        return await self.runner.run(spec, ToolCall(tool_call_id="c", tool_name=tool, tool_args=arguments), context)


@pytest.fixture(params=["local", "mcp"])
async def both(request: pytest.FixtureRequest, notes: Notes, open_tools: OpenTools) -> AsyncIterator[Both]:
    if request.param == "local":
        local = LocalToolRunner(local_tools(notes), max_result_bytes=LIMIT)
        yield Both(local, local)
        await local.close()
    else:
        tools = await open_tools(stdio_toolbox(notes), max_result_bytes=LIMIT)
        yield Both(tools.runner, tools.catalogue)


async def test_a_result_names_its_call(both: Both) -> None:
    result = await both.call("echo", text="hi")

    assert (result.tool_call_id, result.tool_name, result.attempt, result.status) == ("c", "echo", 3, "completed")
    assert result.content == ({"type": "text", "text": "hi"},)
    assert result.duration_ms >= 0


async def test_structure_is_kept(both: Both) -> None:
    assert (await both.call("add", a=1, b=2)).structured_content == {"sum": 3}


async def test_the_tools_own_failure_is_a_result(both: Both) -> None:
    result = await both.call("refuse", reason="no")

    assert (result.status, result.is_error) == ("failed", True)
    assert result.error is not None
    assert result.error.code == "tool_error"


async def test_progress_is_told_in_order(both: Both) -> None:
    await both.call("steps", count=3)

    assert both.progress == [(1, 3, "step 1"), (2, 3, "step 2"), (3, 3, "step 3")]


async def test_a_call_is_announced_before_it_is_sent(both: Both) -> None:
    announced: list[str] = []
    both.before_send = lambda: announced.append("now")
    await both.call("echo", text="hi")
    assert announced == ["now"]


async def test_nothing_is_sent_where_the_lease_is_lost(both: Both, notes: Notes) -> None:
    def lost() -> None:
        raise LeaseLost

    both.before_send = lost
    with pytest.raises(LeaseLost):
        await both.call("hang", label="x")
    both.before_send = lambda: None
    # What had been sent would have been seen before this.
    await both.call("echo", text="hi")
    assert not notes.path.exists() or "started" not in notes.path.read_text()


async def test_a_time_out_stops_the_tool(both: Both, notes: Notes) -> None:
    with pytest.raises(ToolTimedOut) as caught:
        await both.call("hang", timeout=0.5, label="x")

    assert caught.value.sent
    await notes.until("cancelled")


async def test_cancelling_stops_the_tool(both: Both, notes: Notes) -> None:
    running = asyncio.create_task(both.call("hang", label="x"))
    await notes.until("started")

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    await notes.until("cancelled")


async def test_a_result_above_the_limit_says_so(both: Both) -> None:
    with pytest.raises(ResultTooLarge, match=str(LIMIT)):
        await both.call("big", size=LIMIT + 1)


async def test_specs_are_found_by_name(both: Both) -> None:
    assert (await both.runner.describe("echo")).repeatable
    assert not (await both.catalogue.find("hang")).repeatable
    listed = [spec.name for spec in await both.catalogue.tools()]
    assert listed == sorted(listed)
    assert {"add", "big", "echo", "hang"} <= set(listed)


async def test_an_unknown_tool_comes_with_the_nearest(both: Both) -> None:
    await both.catalogue.find("echo")
    for find in (both.catalogue.find, both.runner.describe):
        with pytest.raises(UnknownTool) as caught:
            await find("ecko")
        assert "echo" in caught.value.details["nearest"]


# -- of the in-process runner alone -----------------------------------------------------------------------------


async def test_what_a_function_raises_is_its_failure() -> None:
    errors: list[Exception] = []

    async def breaks(arguments: dict[str, Any], context: CallContext) -> str:
        raise errors.pop()

    local = LocalToolRunner({"breaks": (ToolSpec(name="breaks", server="local", tool="breaks"), breaks)})
    context = CallContext(job_id=JOB, attempt=1, idempotency_key="k", timeout_s=5, on_progress=lambda *_: None)
    spec = await local.find("breaks")
    call = ToolCall(tool_call_id="c", tool_name="breaks")
    cases: list[tuple[Exception, type[ToolFailure]]] = [
        (KeyError("s3cret"), ToolServerFailed),
        (TimeoutError(), ToolServerFailed),
        (ResultTooLarge("own words"), ResultTooLarge),
    ]
    for error, expected in cases:
        errors.append(error)
        with pytest.raises(ToolFailure) as caught:
            await local.run(spec, call, context)
        assert type(caught.value) is expected
        assert "s3cret" not in str(caught.value)


async def test_the_light_parts_do_not_import_the_sdk() -> None:
    program = (
        "import sys\n"
        "from toolfleet.services.tool_execution.local_runner import LocalToolRunner\n"
        "assert 'jsonschema' not in sys.modules\n"
        "from toolfleet.services.tool_execution.mcp_runner import mcp_tools\n"
        "from toolfleet.services.tool_execution.schema_check import check_arguments\n"
        "assert 'mcp' not in sys.modules and 'mcp_types' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
