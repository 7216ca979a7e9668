"""How a call over HTTP fails, and what is then known of its outcome."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from mcp.shared.exceptions import MCPError

from tests.support.waiting import wait_until
from tests.tool_execution.conftest import OpenTools
from tests.tool_execution.harness import Caller, spec_of, text
from tests.tool_execution.raw_http import Exchange, raw_server
from toolfleet.services.background_jobs.errors import (
    ResultTooLarge,
    ToolAnswerUnclear,
    ToolConnectionLost,
    ToolFailure,
    ToolRejected,
    ToolServerFailed,
    ToolUnavailable,
)
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.call_outcome import SessionGone, Where, failure_of
from toolfleet.services.tool_execution.exchange import Exchange as WireExchange
from toolfleet.services.tool_execution.exchange import Refused

CALL = spec_of("raw", "any")
GOOD = {"content": [{"type": "text", "text": "good", "x-more": {"a": None}}], "resultType": "complete"}


async def broken_json(exchange: Exchange) -> None:
    await exchange.status(200, '{"jsonrpc": "2.0", "id"')


async def cut_body(exchange: Exchange) -> None:
    exchange.writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    exchange.writer.close()


async def cut_head(exchange: Exchange) -> None:
    exchange.writer.close()


async def cut_stream(exchange: Exchange) -> None:
    await exchange.stream(": comment\n\n")
    exchange.writer.close()


async def not_a_result(exchange: Exchange) -> None:
    await exchange.result({"content": "no list", "resultType": "complete"})


async def asks_for_input(exchange: Exchange) -> None:
    request = {"method": "elicitation/create", "params": {"message": "?", "requestedSchema": {
        "type": "object", "properties": {}}}}  # fmt: skip
    await exchange.result({"resultType": "input_required", "inputRequests": {"1": request}, "requestState": "s"})


async def page(exchange: Exchange) -> None:
    await exchange.status(502, "<html>bad gateway</html>", "text/html")


async def huge_json(exchange: Exchange) -> None:
    await exchange.result({"content": [{"type": "text", "text": "x" * 1_000_000}], "resultType": "complete"})


async def huge_event(exchange: Exchange) -> None:
    await exchange.stream("data: ", "x" * 1_000_000, "\n\n")


def status(code: int) -> object:
    async def answer(exchange: Exchange) -> None:
        await exchange.status(code)

    return answer


def error(code: int, http: int = 200) -> object:
    async def answer(exchange: Exchange) -> None:
        await exchange.error(code, "the server's words", http)

    return answer


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (status(500), ToolAnswerUnclear),
        (page, ToolAnswerUnclear),
        (status(503), ToolAnswerUnclear),
        (status(401), ToolRejected),
        (status(403), ToolRejected),
        (status(429), ToolUnavailable),
        (status(404), ToolUnavailable),
        (error(-32603), ToolServerFailed),
        (error(-32603, 500), ToolAnswerUnclear),
        (error(0), ToolServerFailed),
        (error(-32602), ToolRejected),
        (error(-32602, 400), ToolRejected),
        (error(-32601, 404), ToolRejected),
        (broken_json, ToolAnswerUnclear),
        (not_a_result, ToolAnswerUnclear),
        (asks_for_input, ToolRejected),
        (cut_head, ToolConnectionLost),
        (cut_body, ToolConnectionLost),
        (cut_stream, ToolConnectionLost),
        (huge_json, ResultTooLarge),
        (huge_event, ResultTooLarge),
    ],
)
async def test_every_bad_answer_is_a_failure_of_its_kind(
    answer: object, failure: type[ToolFailure], open_tools: OpenTools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answers = [answer]

    async def respond(exchange: Exchange) -> None:
        if answers:
            await answers.pop()(exchange)  # type: ignore[operator]
        else:
            await exchange.result(GOOD)

    async with raw_server(respond) as server:
        mcp = McpServer("raw", url=server.url, headers={"Authorization": "Bearer s3cret"})
        call = Caller(await open_tools(mcp, max_result_bytes=100_000))
        with pytest.raises(ToolFailure) as caught:
            await call.run(CALL)
        assert type(caught.value) is failure, repr(caught.value)
        assert "raw" in str(caught.value)
        assert len(server.calls) == 1  # what may have been processed is never sent twice by the runner itself

        # The session is not hurt.
        assert (await call.run(CALL)).content == (GOOD["content"][0],)
        assert await call.opened("raw") == 1
    assert "s3cret" not in caplog.text + str(caught.value) + repr(caught.value.details)


async def test_one_broken_answer_leaves_the_other_calls_alone(open_tools: OpenTools) -> None:
    release = asyncio.Event()

    async def respond(exchange: Exchange) -> None:
        if exchange.message["params"]["arguments"]["break"]:
            exchange.writer.close()
        else:
            await release.wait()
            await exchange.result(GOOD)

    async with raw_server(respond) as server:
        call = Caller(await open_tools(McpServer("raw", url=server.url)))
        waiting = asyncio.create_task(call.run(CALL, **{"break": False}))
        await wait_until(lambda: len(server.calls) == 1, "the first call is on")

        with pytest.raises(ToolConnectionLost):
            await call.run(CALL, **{"break": True})

        release.set()
        assert text(await waiting) == "good"
        assert await call.opened("raw") == 1


async def test_calls_above_the_connection_limit_wait_and_are_not_lost(open_tools: OpenTools) -> None:
    async def respond(exchange: Exchange) -> None:
        await exchange.result(GOOD)

    async with raw_server(respond) as server:
        call = Caller(await open_tools(McpServer("raw", url=server.url), mcp_max_connections=10))

        results = await asyncio.gather(*(call.run(CALL, timeout=60) for _ in range(2000)))

        assert {text(result) for result in results} == {"good"}
        assert server.connections <= 12  # 10 for calls, and one that opened the session


async def test_a_call_that_waited_for_a_connection_all_its_time_was_not_sent(open_tools: OpenTools) -> None:
    async def respond(_exchange: Exchange) -> None:
        await asyncio.Event().wait()

    async with raw_server(respond) as server:
        call = Caller(await open_tools(McpServer("raw", url=server.url), mcp_max_connections=1))
        first = asyncio.create_task(call.run(CALL, timeout=30))
        await wait_until(lambda: len(server.calls) == 1, "the first call is on")

        with pytest.raises(ToolUnavailable, match="could not be sent"):
            await call.run(CALL, timeout=0.2)

        first.cancel()
        await asyncio.wait({first})
        assert len(server.calls) == 1


async def test_a_hung_server_gets_its_connections_taken_away(open_tools: OpenTools) -> None:
    silent = True

    async def respond(exchange: Exchange) -> None:
        if not silent:
            await exchange.result(GOOD)
        elif exchange.message["params"]["arguments"]["stream"]:
            await exchange.stream("id: 1\nretry: 10\ndata:\n\n")
            await asyncio.Event().wait()
        else:
            await asyncio.Event().wait()

    async with raw_server(respond) as server:
        call = Caller(await open_tools(McpServer("raw", url=server.url), mcp_max_connections=2))
        for stream in (True, False, True, False):
            await call.times_out(CALL, stream=stream)
        silent = False

        assert text(await call.run(CALL)) == "good"


async def test_arguments_that_a_tool_wants_in_headers_are_sent_there(open_tools: OpenTools) -> None:
    region = {"type": "string", "x-mcp-header": "Region"}
    listing = {"name": "any", "inputSchema": {"type": "object", "properties": {"region": region}}}

    async def respond(exchange: Exchange) -> None:
        if exchange.message["method"] == "tools/list":
            await exchange.result({"tools": [listing], "resultType": "complete", "ttlMs": 0, "cacheScope": "public"})
        elif exchange.headers.get("mcp-param-region") != "eu":
            await exchange.error(-32020, "header mismatch", 400)
        else:
            await exchange.result(GOOD)

    async with raw_server(respond) as server:
        call = Caller(await open_tools(McpServer("raw", url=server.url)))

        assert text(await call.run(CALL, region="eu")) == "good"
        assert text(await call.run(CALL, region="eu")) == "good"
        assert [message["method"] for message in server.calls] == [
            "tools/call",
            "tools/list",
            "tools/call",
            "tools/call",
        ]
        with pytest.raises(ToolRejected):
            await call.run(CALL, region="us")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, -32600, "Session terminated"),
        (404, -32001, "Session not found"),
        (400, -32000, "Bad Request: No valid session ID provided"),
    ],
)
def test_all_the_ways_to_say_that_a_session_is_unknown(status: int, code: int, message: str) -> None:
    exchange = WireExchange()
    exchange.sent = True
    exchange.fault = Refused(status)

    assert isinstance(failure_of(Where("raw", "any", 1), MCPError(code, message), exchange), SessionGone)


async def test_a_result_keeps_what_no_schema_names(open_tools: OpenTools) -> None:
    async def respond(exchange: Exchange) -> None:
        event = {"jsonrpc": "2.0", "id": exchange.message["id"], "result": {**GOOD, "structuredContent": [1, None]}}
        await exchange.stream(f"data: {json.dumps(event)}\n\n")

    async with raw_server(respond) as server:
        call = Caller(await open_tools(McpServer("raw", url=server.url)))
        result = await call.run(CALL)

    assert result.content == (GOOD["content"][0],)
    assert result.structured_content == [1, None]
