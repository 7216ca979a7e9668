"""An HTTP server whose answers a test writes byte by byte: what no MCP library would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request and the connection to answer on."""

    message: dict[str, Any]
    headers: dict[str, str]
    writer: asyncio.StreamWriter

    async def status(self, status: int, body: str = "", kind: str = "application/json") -> None:
        """A whole response."""
        data = body.encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        self.writer.write(head.encode() + data)
        await self.writer.drain()

    async def result(self, result: dict[str, Any]) -> None:
        """A JSON-RPC result."""
        await self.status(200, json.dumps({"jsonrpc": "2.0", "id": self.message["id"], "result": result}))

    async def error(self, code: int, message: str, status: int = 200) -> None:
        """A JSON-RPC error."""
        error = {"code": code, "message": message}
        await self.status(status, json.dumps({"jsonrpc": "2.0", "id": self.message["id"], "error": error}))

    async def stream(self, *parts: str) -> None:
        """The beginning of an event stream that ends only with the connection."""
        self.writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        self.writer.write("".join(parts).encode())
        await self.writer.drain()


@dataclass
class RawServer:
    """Speaks 2026-07-28 for everything but `tools/call`, which is the test's."""

    port: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/mcp?key=s3cret"


async def _read_request(reader: asyncio.StreamReader) -> tuple[dict[str, str], bytes] | None:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
    return headers, await reader.readexactly(int(headers.get("content-length", "0")))


@asynccontextmanager
async def raw_server(answer: Answer, port: int = 0) -> AsyncIterator[RawServer]:
    """Serves until the context is left; every `tools/call` goes to `answer`. Port 0 takes a free one."""
    state = RawServer()
    open_writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        state.connections += 1
        open_writers.add(writer)
        try:
            while (request := await _read_request(reader)) is not None:
                exchange = Exchange(json.loads(request[1]), request[0], writer)
                if exchange.message["method"] == "server/discover":
                    await exchange.result(
                        {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}, "resultType": "complete",
                         "ttlMs": 0, "cacheScope": "public"}
                    )  # fmt: skip
                    continue
                state.calls.append(exchange.message)
                await answer(exchange)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            open_writers.discard(writer)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    state.port = server.sockets[0].getsockname()[1]
    try:
        yield state
    finally:
        server.close()
        for writer in list(open_writers):
            writer.close()
