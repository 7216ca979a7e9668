"""An MCP server that breaks in the ways that servers break, over stdio or HTTP.

    python -m tests.faults.unruly_server stdio NOTES
    python -m tests.faults.unruly_server http NOTES PORT        prints the port that it listens on

NOTES is a file to which every call appends a line, ``[tool, arguments, id of the request]``, before anything else
happens. What a call does is told in its arguments; `times` bounds how often it misbehaves, over restarts, and without
it there is no end:

    echo                  answers with the number of the request
    crash                 the process ends without an answer
    hang                  no answer, ever
    late    until         answers once a file exists, whether or not the call was cancelled meanwhile; with a line of
                          its own in NOTES, ``answered``
    garble  how           sends what is no answer (`GARBLED`), and nothing after it
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.tool_execution.raw_http import Exchange, raw_server

TOOLS = ("echo", "crash", "hang", "late", "garble")
GARBLED: dict[str, bytes] = {
    "half": b'{"jsonrpc": "2.0", "id": %d, "result": {"content": [{"type": "te',
    "no json": b"Traceback (most recent call last):",
    "no utf-8": b'{"jsonrpc": "2.0", "id": %d, "result": {"content": ["\xff\xfe"]}}',
    "no result": b'{"jsonrpc": "2.0", "id": %d, "result": {"content": "no list", "resultType": "complete"}}',
    "another id": b'{"jsonrpc": "2.0", "id": 987654321, "result": {"content": [], "resultType": "complete"}}',
}
"""Bodies of an answer over HTTP, lines over stdio; ``%d`` is the id of the request."""
_POLL_S = 0.01

Reply = Callable[[dict[str, Any]], Awaitable[None]]
Raw = Callable[[bytes], Awaitable[None]]


class Behaviour:
    """What the server does, whatever it is reached by."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def _count(self, tool: str, arguments: dict[str, Any], request: object) -> int:
        """Takes a note of a call, and counts those with the same arguments, of every process so far."""
        with self._notes.open("a+") as notes:
            notes.write(json.dumps([tool, arguments, request]) + "\n")
            notes.flush()
            notes.seek(0)
            return [json.loads(line)[:2] for line in notes].count([tool, arguments])

    async def call(self, message: dict[str, Any], reply: Reply, raw: Raw) -> None:
        """One `tools/call`."""
        tool, arguments = message["params"]["name"], message["params"].get("arguments", {})
        if self._count(tool, arguments, message["id"]) <= arguments.get("times", 1_000_000):
            match tool:
                case "crash":
                    os._exit(3)
                case "hang":
                    await asyncio.Event().wait()
                case "late":
                    while not Path(arguments["until"]).exists():
                        await asyncio.sleep(_POLL_S)
                    self._count("answered", arguments, message["id"])
                case "garble":
                    await raw(GARBLED[arguments["how"]].replace(b"%d", str(message["id"]).encode()))
                    return
        await reply({"content": [{"type": "text", "text": f"request {message['id']}"}], "resultType": "complete"})


def listing() -> dict[str, Any]:
    """The result of `tools/list`."""
    tools = [{"name": name, "inputSchema": {"type": "object"}} for name in TOOLS]
    return {"tools": tools, "resultType": "complete", "ttlMs": 0, "cacheScope": "public"}


def discovered() -> dict[str, Any]:
    """The result of `server/discover`."""
    return {
        "supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}, "resultType": "complete", "ttlMs": 0,
        "cacheScope": "public",
    }  # fmt: skip


async def serve_http(behaviour: Behaviour, port: int) -> None:
    """Until the process ends."""

    async def answer(exchange: Exchange) -> None:
        async def raw(body: bytes) -> None:
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            exchange.writer.write(head.encode() + body)
            await exchange.writer.drain()

        if exchange.message["method"] == "tools/list":
            await exchange.result(listing())
        else:
            await behaviour.call(exchange.message, exchange.result, raw)

    async with raw_server(answer, port) as server:
        print(server.port, flush=True)
        await asyncio.Event().wait()


async def serve_stdio(behaviour: Behaviour) -> None:
    """Until standard input ends."""
    calls: set[asyncio.Task[None]] = set()

    async def raw(line: bytes) -> None:
        os.write(1, line + b"\n")

    def reply_to(message: dict[str, Any]) -> Reply:
        async def reply(result: dict[str, Any]) -> None:
            await raw(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}).encode())

        return reply

    while line := await asyncio.to_thread(sys.stdin.readline):
        message = json.loads(line)
        match message.get("method"):
            case "server/discover":
                await reply_to(message)(discovered())
            case "tools/list":
                await reply_to(message)(listing())
            case "tools/call":
                call = asyncio.create_task(behaviour.call(message, reply_to(message), raw))
                calls.add(call)
                call.add_done_callback(calls.discard)
    for call in calls:
        call.cancel()


if __name__ == "__main__":
    told = Behaviour(Path(sys.argv[2]))
    asyncio.run(serve_stdio(told) if sys.argv[1] == "stdio" else serve_http(told, int(sys.argv[3])))
