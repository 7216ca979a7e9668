"""What a call gives and costs, over every transport and protocol generation."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable

import pytest

from tests.tool_execution.conftest import OpenTools, StartHttp
from tests.tool_execution.harness import JOB, Caller, Notes, peer, spec_of, text
from tests.tool_execution.servers.toolbox import PIXEL
from toolfleet.services.background_jobs.errors import ResultTooLarge, ToolRejected, ToolTimedOut
from toolfleet.services.background_jobs.task_models import ToolResult
from toolfleet.services.discovery.models import McpServer


async def test_text_structure_images_and_errors_arrive_as_they_came(call: Caller) -> None:
    result = await call("echo", text="häl\u2028lo")
    assert (result.status, text(result), result.error) == ("completed", "häl\u2028lo", None)
    assert (result.tool_call_id, result.tool_name, result.attempt) == ("call_1", "echo", 1)

    structured = await call("add", a=2, b=3)
    assert structured.structured_content == {"sum": 5}

    picture = await call("picture")
    assert [block["type"] for block in picture.content] == ["text", "image"]
    assert picture.content[1]["mimeType"] == "image/png"
    assert base64.b64decode(str(picture.content[1]["data"])) == PIXEL

    refused = await call("refuse", reason="out of paper")
    assert (refused.status, refused.is_error) == ("failed", True)
    assert refused.error is not None
    assert refused.error.code == "tool_error"
    assert "out of paper" in refused.error.message


async def test_arguments_arrive_as_they_were_given(call: Caller) -> None:
    value: dict[str, object] = {"none": None, "list": [None, 1, 1.5, "é", True], "deep": {"empty": {}}}

    assert json.loads(text(await call("keep", value=value))) == value


async def test_a_call_carries_its_idempotency_key_and_attempt(call: Caller) -> None:
    meta = json.loads(text(await call("about", attempt=7)))["meta"]

    assert meta["toolfleet/idempotency-key"] == f"{JOB}:call_1"
    assert meta["toolfleet/attempt"] == 7


async def test_progress_is_passed_on(call: Caller) -> None:
    assert text(await call("steps", count=3)) == "done"

    assert call.progress == [(1, 3, "step 1"), (2, 3, "step 2"), (3, 3, "step 3")]


async def test_a_call_that_takes_too_long_is_stopped_at_the_server(call: Caller, notes: Notes) -> None:
    with pytest.raises(ToolTimedOut, match=r"toolbox/hang.*0\.5 s"):
        await call("hang", timeout=0.5, label="slow")

    await notes.until("cancelled", "slow")
    assert text(await call("echo", text="on")) == "on"
    assert await call.opened("toolbox") == 1


async def test_cancelling_a_call_stops_it_at_the_server_and_leaves_the_others(call: Caller, notes: Notes) -> None:
    cancelled = asyncio.create_task(call("hang", label="cancelled"))
    other = asyncio.create_task(call("hang", label="other"))
    await notes.until("started", "cancelled")
    await notes.until("started", "other")

    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled

    await notes.until("cancelled", "cancelled")
    assert text(await call("echo", text="on")) == "on"
    assert not other.done()
    assert not notes.entries("cancelled", "other")
    assert await call.opened("toolbox") == 1
    other.cancel()
    await asyncio.wait({other})


async def test_a_result_above_the_limit_fails_its_call_and_no_other(toolbox: McpServer, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(toolbox, max_result_bytes=200_000))
    await call("echo", text="open")

    for size in (250_000, 2_000_000):
        with pytest.raises(ResultTooLarge, match=r"bytes, more than the limit of 200000"):
            await call("big", size=size)

    assert len(text(await call("big", size=50_000))) == 50_000
    assert await call.opened("toolbox") == 1


async def test_200_calls_at_once_share_one_session(call: Caller) -> None:
    await call("echo", text="open")

    results = await asyncio.gather(*(call("echo", text=str(number)) for number in range(200)))

    assert [text(result) for result in results] == [str(number) for number in range(200)]
    assert await call.opened("toolbox") == 1


async def test_a_tool_that_asks_for_input_fails_and_does_not_hang(call: Caller) -> None:
    outcome = await outcome_of(call("ask"))

    assert isinstance(outcome, ToolRejected) or outcome.is_error
    assert "elicit" in (str(outcome) if isinstance(outcome, ToolRejected) else text(outcome)).lower()


async def test_a_tool_that_the_server_does_not_know_is_no_result(call: Caller) -> None:
    outcome = await outcome_of(call.run(spec_of("toolbox", "nonsense")))

    # Servers of the SDK's previous release say it in a result of their own.
    assert isinstance(outcome, ToolRejected) or outcome.is_error
    assert "nonsense" in (str(outcome) if isinstance(outcome, ToolRejected) else text(outcome))


async def test_a_server_that_answers_with_plain_json_works_too(
    notes: Notes, start_http: StartHttp, open_tools: OpenTools
) -> None:
    server = await start_http(peer("python"), ("json",))
    call = Caller(await open_tools(McpServer("toolbox", url=server.url), max_result_bytes=200_000))

    assert text(await call("echo", text="plain")) == "plain"
    with pytest.raises(ResultTooLarge):
        await call("big", size=2_000_000)
    with pytest.raises(ToolTimedOut):
        await call("hang", timeout=0.5, label="slow")
    await notes.until("cancelled", "slow")
    assert await call.opened("toolbox") == 1


async def outcome_of(running: Awaitable[ToolResult]) -> ToolResult | ToolRejected:
    """The result, or the refusal."""
    try:
        return await running
    except ToolRejected as refusal:
        return refusal
