"""HTTP underneath the SDK's streamable HTTP client, so that one request's failure stays with that request.

In the SDK (2.3) an exception of the HTTP client ends the task group of the whole session, and with it every other
call that is on it; a cancel notification is posted in line, so a hung server holds up all that is written after it;
and a response body is read without a bound. This transport takes those three away: it answers in the server's place
where there is no answer, posts cancel notifications aside with a bound and from a pool of their own, and reads JSON
bodies up to a limit. What it saw of a request stands in the request's `Exchange`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import httpx2

from toolfleet.services.tool_execution.exchange import (
    Broken,
    Exchange,
    NotSent,
    Oversized,
    Refused,
    current_exchange,
)
from toolfleet.services.tool_execution.progress_gate import Pace
from toolfleet.services.tool_execution.sse_filter import SseFilter

_log = logging.getLogger(__name__)

_TELL_S: Final = 2.0
"""The bound of telling a server something that nobody waits for: a cancel, the end of a session."""
_CONTROL_CONNECTIONS: Final = 16
"""Beside those of the calls, so that a cancel gets through while every call connection is taken."""
_IDLE_S: Final = 30.0
"""How long an unused connection is kept; below the idle limits of common servers and proxies (60 s and above)."""
_WRITE_S: Final = 30.0
_ERROR_BODY: Final = 64 << 10
"""Bytes read of an error response: a JSON-RPC error is far smaller."""
_CHUNK_CPU_S: Final = 50e-6
"""CPU time that a piece of a response takes from the socket to here, most of it in the parsing of HTTP chunks; servers
send an event in a chunk of its own."""
_CALL_ID: Final = re.compile(rb'\{"jsonrpc":"2\.0","id":(\d{1,15}),"method":"tools/call"')
"""A call as the SDK writes it; its id is its progress token."""
_ERROR: Final = b'"error":'
"""Of a JSON-RPC error, or a word of the tool's; in doubt it is the former."""
_NO_ANSWER: Final = 599
"""Status with which a request is answered in place of a server that did not; never sent over a wire."""


@asynccontextmanager
async def open_http(
    headers: Mapping[str, str], *, connect_timeout: float, max_connections: int, max_body: int
) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client for one MCP server.

    Args:
        headers: configured for the server, credentials among them; sent with every request.
        connect_timeout: seconds for TCP and TLS.
        max_connections: of calls; further ones wait for a free connection, first come first served.
        max_body: bytes of a JSON response; above it the call fails and the rest is not read.
    """
    # They log URLs, where an API key may stand in the query, session ids, and with 'debug' every argument.
    for library in ("httpx2", "httpcore2", "mcp.client"):
        logging.getLogger(library).setLevel(logging.WARNING)
    transport = ContainedTransport(max_connections=max_connections, max_body=max_body)
    timeout = httpx2.Timeout(connect=connect_timeout, write=_WRITE_S, read=None, pool=None)
    # Uncompressed: otherwise a small body could become one of any size.
    async with httpx2.AsyncClient(
        transport=transport, timeout=timeout, headers={**headers, "Accept-Encoding": "identity"}
    ) as client:
        yield client


class ContainedTransport(httpx2.AsyncBaseTransport):
    """Sends requests and always gives a response; never raises for what a server or a network does."""

    def __init__(self, *, max_connections: int, max_body: int) -> None:
        self._max_body = max_body
        self._calls = httpx2.AsyncHTTPTransport(limits=_limits(max_connections))
        self._control = httpx2.AsyncHTTPTransport(limits=_limits(_CONTROL_CONNECTIONS))
        self._telling: set[asyncio.Task[None]] = set()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; status 599 stands for 'no answer', with the reason in the exchange."""
        if request.method == "POST" and (method := _notification(request)) is not None:
            return await self._notify(request, method)
        if request.method == "DELETE":
            return await self._bounded(request)
        exchange = current_exchange() or Exchange()
        if request.method == "GET" and "last-event-id" not in request.headers:
            return await self._listen(request)
        if exchange.abandoned:
            return httpx2.Response(_NO_ANSWER)
        return await self._send(request, exchange)

    async def aclose(self) -> None:
        """Finish telling, within its bound, and close all connections."""
        if self._telling:
            await asyncio.wait(self._telling, timeout=_TELL_S)
        await self._calls.aclose()
        await self._control.aclose()

    async def _send(self, request: httpx2.Request, exchange: Exchange) -> httpx2.Response:
        """A request whose answer somebody waits for."""
        exchange.fault = None
        if (call := _CALL_ID.match(request.content)) is not None:
            exchange.token = int(call.group(1))
        request.extensions = {**request.extensions, "trace": exchange.trace}
        response: httpx2.Response | None = None
        with exchange.waiting():
            try:
                response = await self._calls.handle_async_request(request)
                return await self._received(response, exchange)
            except asyncio.CancelledError:
                if not exchange.abandoned:
                    exchange.closed()
                raise
            except (httpx2.TransportError, OSError) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                exchange.fault = Broken(reason) if exchange.sent else NotSent(reason)
                if response is not None:
                    await response.aclose()
        return httpx2.Response(_NO_ANSWER)

    async def _received(self, response: httpx2.Response, exchange: Exchange) -> httpx2.Response:
        """The response as the SDK may have it: bodies that are read at once are read here, within their bound."""
        failed = response.status_code >= 400
        if failed:
            exchange.fault = Refused(response.status_code)
        if not failed and not response.headers.get("content-type", "").lower().startswith("application/json"):
            return httpx2.Response(
                response.status_code,
                headers=response.headers,
                stream=_WatchedStream(response, exchange),
                extensions=response.extensions,
            )
        body = await _read(response, _ERROR_BODY if failed else self._max_body)
        exchange.answered(result=not failed and not (body and _ERROR in body))
        if body is None and not failed:
            exchange.fault = Oversized(self._max_body)
            return httpx2.Response(_NO_ANSWER)
        return httpx2.Response(response.status_code, headers=_plain(response.headers), content=body or b"")

    async def _notify(self, request: httpx2.Request, method: str) -> httpx2.Response:
        """A notification: nobody waits for its answer, and a cancel must not hold up the writes behind it."""
        if method != "notifications/cancelled":
            return await self._bounded(request)
        task = asyncio.create_task(self._tell(request, current_exchange()), name="mcp-tell-cancelled")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return httpx2.Response(202)

    async def _tell(self, request: httpx2.Request, exchange: Exchange | None) -> None:
        response = await self._bounded(request)
        if exchange is not None:
            exchange.server_told(response.status_code < 400)
        if response.status_code >= 400:
            _log.warning("an MCP server could not be told of a cancelled call (status %d)", response.status_code)

    async def _bounded(self, request: httpx2.Request) -> httpx2.Response:
        """A request whose answer has no content that matters."""
        try:
            async with asyncio.timeout(_TELL_S):
                response = await self._control.handle_async_request(request)
                body = await _read(response, _ERROR_BODY)
        except (httpx2.TransportError, OSError, TimeoutError):
            return httpx2.Response(_NO_ANSWER)
        return httpx2.Response(response.status_code, headers=_plain(response.headers), content=body or b"")

    async def _listen(self, request: httpx2.Request) -> httpx2.Response:
        """The session's own stream of server messages; the SDK opens it again where it ends."""
        try:
            return await self._control.handle_async_request(request)
        except (httpx2.TransportError, OSError):
            return httpx2.Response(_NO_ANSWER)


class _WatchedStream(httpx2.AsyncByteStream):
    """A response stream that notes how it broke, and that `Exchange.abandon` ends."""

    def __init__(self, response: httpx2.Response, exchange: Exchange) -> None:
        self._response = response
        self._exchange = exchange
        self._proves = True
        """Whether the end of this stream is the end of the tool: not where an event had an id, since then the answer
        may come on another one, nor where an error came, see `Exchange.over`. In doubt it is not."""
        self._ended = False
        self._filter: SseFilter | None = None
        if exchange.progress is not None and exchange.token is not None:
            self._filter = SseFilter(exchange.progress, exchange.token)
        self._pace = Pace()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._response.stream)  # type: ignore[arg-type]  # an async transport gives an async stream
        while True:
            chunk: bytes | None = None
            with self._exchange.waiting() as scope:
                try:
                    chunk = await self._next(chunks)
                except (httpx2.TransportError, OSError) as error:
                    self._exchange.fault = Broken(f"{type(error).__name__}: {error}")
                    raise
            if chunk is None:
                if scope.cancelled_caught:
                    raise httpx2.ReadError("nobody waits for this answer any more")
                self._ended = True
                self._exchange.answered(result=self._proves)
                if self._filter is not None and (rest := self._filter.rest()):
                    yield rest
                return
            yield chunk

    async def _next(self, chunks: AsyncIterator[bytes]) -> bytes | None:
        """What the SDK is to see next; None at the end. Read slowly while it is a flood: the server then blocks."""
        while (chunk := await anext(chunks, None)) is not None:
            self._proves = self._proves and b"id:" not in chunk and _ERROR not in chunk
            if self._filter is None:
                return chunk
            passed = self._filter.feed(chunk)
            if self._filter.flooding:
                self._pace.spent(_CHUNK_CPU_S)
                if (rest := self._pace.rest()) > 0:
                    await asyncio.sleep(rest)
            if passed:
                return passed
        return None

    async def aclose(self) -> None:
        """Close the connection, or give it back where the stream was read to its end."""
        try:
            await self._response.aclose()
        finally:
            if not self._ended and not self._exchange.abandoned:
                self._exchange.closed()


def _limits(connections: int) -> httpx2.Limits:
    return httpx2.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_IDLE_S)


def _notification(request: httpx2.Request) -> str | None:
    """The method, where the body is a JSON-RPC notification: a message with a method and without an id."""
    if len(request.content) > _ERROR_BODY or b'"notifications/' not in request.content:
        return None
    message = json.loads(request.content)
    return message["method"] if "id" not in message else None


def _plain(headers: httpx2.Headers) -> httpx2.Headers:
    """The headers for a body that has been read and decoded."""
    kept = httpx2.Headers(headers)
    for name in ("content-encoding", "content-length", "transfer-encoding"):
        kept.pop(name, None)
    return kept


async def _read(response: httpx2.Response, limit: int) -> bytes | None:
    """The decoded body, or None where it is longer than the limit; the rest is then not read."""
    try:
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > limit:
                return None
        return bytes(body)
    finally:
        await response.aclose()
