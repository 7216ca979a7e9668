"""The little of HTTP/1.1 that the clients need, one connection a request.

httpx looks through all its connections at every request; with hundreds of streams open the driver would be what the
run measures. And a connection that is never used again leaves no doubt whether a request was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

LIMIT: Final = 4 << 20
"""Bytes of one line or chunk; above the largest event."""


class Gone(Exception):
    """The server could not be reached, or the connection ended before the answer did."""


class Silent(Gone):
    """Nothing came for as long as was asked."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


async def ask(
    method: str, host: str, port: int, path: str, *, body: Any = None, headers: Mapping[str, str] | None = None,
    query: Mapping[str, Any] | None = None, silence_s: float,
) -> Answer:  # fmt: skip
    """One request and its whole answer.

    Raises:
        Gone: see there; `Silent` where the server said nothing for `silence_s` seconds.
    """
    target = f"{path}?{urlencode(query)}" if query else path
    async with _opened(method, host, port, target, body, headers or {}, silence_s) as (answer, lines):
        parts = [part async for part in lines]
        return Answer(answer.status, answer.headers, b"".join(parts))


@contextlib.asynccontextmanager
async def stream(
    host: str, port: int, path: str, *, headers: Mapping[str, str], silence_s: float
) -> AsyncGenerator[tuple[Answer, AsyncGenerator[bytes, None]], None]:
    """A GET whose body comes in parts; raises as `ask`, also while it is read."""
    async with _opened("GET", host, port, path, None, headers, silence_s) as opened:
        yield opened


@contextlib.asynccontextmanager
async def _opened(
    method: str, host: str, port: int, target: str, body: Any, headers: Mapping[str, str], silence_s: float
) -> AsyncGenerator[tuple[Answer, AsyncGenerator[bytes, None]], None]:
    with _translated():
        async with asyncio.timeout(silence_s):
            reader, writer = await asyncio.open_connection(host, port, limit=LIMIT)
    try:
        with _translated():
            content = b"" if body is None else json.dumps(body).encode()
            sent = {"Host": f"{host}:{port}", "Connection": "close", "Content-Length": str(len(content)), **headers}
            if content:
                sent["Content-Type"] = "application/json"
            head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
            writer.write(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + content)
            async with asyncio.timeout(silence_s):
                await writer.drain()
                answer = await _head(reader)
        parts = _parts(reader, answer, silence_s)
        async with contextlib.aclosing(parts):
            yield answer, parts
    finally:
        writer.transport.abort()


@contextlib.contextmanager
def _translated() -> Any:
    try:
        yield
    except TimeoutError as error:
        raise Silent from error
    except (OSError, EOFError, ValueError) as error:
        raise Gone(str(error)) from error


async def _head(reader: asyncio.StreamReader) -> Answer:
    status = (await reader.readuntil(b"\r\n")).split()
    headers: dict[str, str] = {}
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return Answer(int(status[1]), headers)


async def _parts(reader: asyncio.StreamReader, answer: Answer, silence_s: float) -> AsyncGenerator[bytes, None]:
    """The body as it comes; an end that the server did not announce is `Gone`."""
    chunked = answer.headers.get("transfer-encoding") == "chunked"
    left = int(answer.headers.get("content-length", 0))
    while True:
        with _translated():
            async with asyncio.timeout(silence_s):
                if chunked:
                    left = int(await reader.readuntil(b"\r\n"), 16)
                part = await reader.readexactly(left)
                if chunked:
                    await reader.readexactly(2)
        if part:
            yield part
        if not chunked or not left:
            return
