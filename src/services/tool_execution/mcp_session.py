"""One open session with one MCP server, shared by all calls that run at once.

The SDK's client is entered and left by one task of this session, since its cancel scopes belong to the task that
entered them; calls run in tasks of their own (`request_tasks`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, Literal, cast

from mcp import Client
from mcp.client import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_types import (
    CONNECTION_CLOSED,
    HEADER_MISMATCH,
    CallToolRequest,
    CallToolRequestParams,
    Implementation,
    PaginatedRequestParams,
    RequestParamsMeta,
)
from mcp_types.version import LATEST_MODERN_VERSION, MODERN_PROTOCOL_VERSIONS
from pydantic import RootModel, ValidationError

from toolfleet.services.background_jobs.errors import (
    ToolAnswerUnclear,
    ToolTimedOut,
    ToolUnavailable,
)
from toolfleet.services.background_jobs.ports import ProgressSink
from toolfleet.services.background_jobs.transitions import CallStop
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.call_outcome import Where, failure_of, named, not_opened
from toolfleet.services.tool_execution.exchange import Exchange, use_exchange
from toolfleet.services.tool_execution.http_transport import open_http
from toolfleet.services.tool_execution.progress_gate import ProgressGate
from toolfleet.services.tool_execution.request_tasks import RequestTasks
from toolfleet.services.tool_execution.stdio_transport import stdio_transport

_log = logging.getLogger(__name__)

Mode = Literal["auto", "legacy"]
"""The SDK's: `auto` asks for the newest protocol and falls back to the older handshake; `legacy` is that alone."""

_CLIENT: Final = Implementation(name="toolfleet", version=version("toolfleet"))
_LEAVE_S: Final = 10.0
"""For a session to close; above the bounds of the transports together."""
_PROBE_S: Final = 5.0
_DISCOVER_S: Final = 5.0
_DISCOVER_SHARE: Final = 0.5
"""For a stdio server to answer the question before the handshake: seconds, and of the time to connect; the smaller
counts. Some older servers never answer it; for one that only starts slowly the handshake follows in the same pipe."""
_PAGES: Final = 100
"""Of a tool listing: a server that pages for ever must not hold the catalogue."""
_JSON_OVERHEAD: Final = 3
"""A message may be this many times the result's limit: escapes (``\\u00e9`` for two bytes of UTF-8) and framing."""


class _Raw(RootModel[dict[str, Any]]):
    """A result as it came; the SDK has checked it against the protocol's schema by then."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds of a session. Sizes in bytes, times in seconds."""

    connect_timeout: float
    max_result_bytes: int
    max_connections: int


class McpSession:
    """One open session. Open it once; when it has ended, make another.

    Args:
        server: how the server is reached.
        limits: its bounds.
    """

    def __init__(self, server: McpServer, limits: SessionLimits) -> None:
        self.server = server
        self._limits = limits
        self._session: ClientSession | None = None
        self._owner: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()
        self._requests = RequestTasks()
        self._answered = False
        self._ended = False

    @property
    def usable(self) -> bool:
        """Whether a new call can be made on it."""
        return self._session is not None and not self._ended

    @property
    def answered(self) -> bool:
        """Whether the server has ever answered a call or a listing on it."""
        return self._answered

    @property
    def modern(self) -> bool:
        """Whether it speaks 2026-07-28 or later, which over HTTP keeps no state between requests."""
        return self.protocol_version in MODERN_PROTOCOL_VERSIONS

    @property
    def protocol_version(self) -> str | None:
        """As negotiated."""
        return self._session.protocol_version if self._session else None

    async def open(self, mode: Mode, timeout: float) -> None:
        """Connect and negotiate.

        After a failure `close` is still to be called: it waits for what was started to be gone.

        Raises:
            TimeoutError: the server did not answer in time.
            ToolUnavailable: it can't be reached or started, or refuses; the message says why.
        """
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._owner = asyncio.create_task(self._own(mode, timeout, opened), name=f"mcp-session-{self.server.name}")
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(opened)
        except BaseException:
            # Not waited for: ending a process takes seconds, and the caller has waited long enough. See `close`.
            opened.cancel()
            self._owner.cancel()
            raise

    async def close(self) -> None:
        """End the session; calls on it fail as lost. Safe to repeat."""
        self._ended = True
        self._leave.set()
        owner = self._owner
        if owner is None or owner.done():
            return
        if self._session is None:
            # Still connecting: only cancelling ends the SDK's wait for an answer.
            owner.cancel()
        _, late = await asyncio.wait({owner}, timeout=_LEAVE_S)
        if late:
            _log.warning("session with MCP server %s does not end; cancelling it", self.server.name)
            owner.cancel()
            await asyncio.wait({owner}, timeout=_LEAVE_S)

    async def idle(self) -> None:
        """Wait until no call is on it."""
        await self._requests.none()

    async def _own(self, mode: Mode, timeout: float, opened: asyncio.Future[None]) -> None:
        """Enter the client, keep it until the end, leave it: all in this task."""
        exchange = Exchange()
        use_exchange(exchange)
        try:
            client = Client(
                self._transport(timeout), mode=mode, cache=None, client_info=_CLIENT, read_timeout_seconds=None
            )
            async with client:
                self._session = client.session
                if not opened.done():
                    opened.set_result(None)
                await self._leave.wait()
        except Exception as error:
            # The boundary to the SDK: whatever it raises, this session is over, and the next call opens another.
            if not opened.done():
                opened.set_exception(not_opened(self.server, error, exchange))
            elif self._leave.is_set():
                _log.debug("leaving MCP server %s: %s", self.server.name, named(error))
            else:
                _log.warning("session with MCP server %s broke: %s", self.server.name, named(error))
        finally:
            self._ended = True
            if not opened.done():
                opened.cancel()

    def _transport(self, timeout: float) -> AbstractAsyncContextManager[Any]:
        wire_limit = self._limits.max_result_bytes * _JSON_OVERHEAD
        if self.server.url is None:
            probe = min(_DISCOVER_S, timeout * _DISCOVER_SHARE)
            return stdio_transport(self.server, max_line=wire_limit, on_end=self._end, probe_timeout=probe)
        return self._http(self.server.url, wire_limit)

    @asynccontextmanager
    async def _http(self, url: str, wire_limit: int) -> AsyncIterator[Any]:
        async with (
            open_http(
                self.server.headers,
                connect_timeout=self._limits.connect_timeout,
                max_connections=self._limits.max_connections,
                max_body=wire_limit,
            ) as http,
            streamable_http_client(url, http_client=http, max_sse_event_size=wire_limit) as streams,
        ):
            yield streams

    def _end(self) -> None:
        """The server has closed the connection: no call may start on it, and the owner leaves."""
        self._ended = True
        self._leave.set()

    async def call(
        self, tool: str, arguments: Mapping[str, Any], *, meta: Mapping[str, Any], on_progress: ProgressSink,
        timeout: float, on_stop: Callable[[CallStop], None] = lambda _: None,
    ) -> Mapping[str, Any]:  # fmt: skip
        """Call a tool; the result object as it came. Where the caller is cancelled, `on_stop` is told how far it got.

        Raises:
            ToolFailure: one of its subclasses. `SessionGone` where another session can take the call.
        """
        where = Where(self.server.name, tool, self._limits.max_result_bytes)
        exchange = Exchange(closing_tells=self.modern and self.server.url is not None)
        exchange.progress = ProgressGate(on_progress)

        # For the notifications that the transport did not recognise.
        async def tell(progress: float, total: float | None, message: str | None) -> None:
            on_progress(progress, total, message)

        async def attempt() -> Mapping[str, Any]:
            session = self._open_session()
            request = CallToolRequest(
                params=CallToolRequestParams(
                    name=tool, arguments=dict(arguments), _meta=cast("RequestParamsMeta", dict(meta))
                )
            )
            try:
                answer = await session.send_request(request, _Raw, progress_callback=tell)
            except MCPError as error:
                if error.code != HEADER_MISMATCH:
                    raise
                # The tool mirrors arguments into headers, which the SDK knows from the listing only.
                await self._listed(session)
                answer = await session.send_request(request, _Raw, progress_callback=tell)
            self._answered = True
            return answer.root

        try:
            with exchange.progress:
                return await self._requests.run(attempt(), exchange, timeout, on_stop)
        except TimeoutError:
            if not exchange.sent:
                raise ToolUnavailable(
                    f"the call of '{where.name}' could not be sent within {timeout:.3g} s: all connections to MCP "
                    f"server '{where.server}' are busy"
                ) from None
            raise ToolTimedOut(
                f"'{where.name}' did not answer within {timeout:.3g} s; its server is told to stop"
            ) from None
        except MCPError as error:
            raise failure_of(where, error, exchange) from error
        except ValidationError as error:
            raise ToolAnswerUnclear(_not_a_result(where, error)) from None

    async def list_tools(self) -> list[dict[str, Any]]:
        """All tools of the server, page by page, in the protocol's own form.

        Raises:
            ToolFailure: one of its subclasses.
        """
        where = Where(self.server.name, "tools/list", self._limits.max_result_bytes)
        exchange = Exchange()
        try:
            session = self._open_session()
            return await self._requests.run(self._listed(session), exchange, self._limits.connect_timeout)
        except TimeoutError:
            raise ToolTimedOut(f"MCP server '{self.server.name}' did not list its tools in time") from None
        except MCPError as error:
            raise failure_of(where, error, exchange) from error
        except ValidationError as error:
            raise ToolAnswerUnclear(_not_a_result(where, error)) from None

    async def alive(self) -> bool:
        """Whether the server still answers anything at all, within a bound."""
        try:
            session = self._open_session()
            question = _anything(session)
            await self._requests.run(question, Exchange(), min(_PROBE_S, self._limits.connect_timeout))
        except TimeoutError:
            return False
        except MCPError as error:
            return error.code != CONNECTION_CLOSED  # an error is an answer
        return True

    def _open_session(self) -> ClientSession:
        if self._session is None or self._ended:
            raise MCPError(CONNECTION_CLOSED, "the session has ended")
        return self._session

    async def _listed(self, session: ClientSession) -> list[dict[str, Any]]:
        tools: list[dict[str, Any]] = []
        cursor: str | None = None
        for _ in range(_PAGES):
            page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
            tools += [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in page.tools]
            cursor = page.next_cursor
            if not cursor:
                self._answered = True
                return tools
        _log.warning("MCP server %s lists its tools on more than %d pages; the rest is left", self.server.name, _PAGES)
        return tools


async def _anything(session: ClientSession) -> None:
    """Ask what every server can answer. The protocol of 2026-07-28 has no ping; asking for its versions is as cheap."""
    if session.protocol_version in MODERN_PROTOCOL_VERSIONS:
        await session.send_discover(LATEST_MODERN_VERSION)
    else:
        await session.send_ping()


def _not_a_result(where: Where, error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "the result"
    return f"MCP server '{where.server}' answered '{where.name}' with an invalid result: {field}: {first['msg']}"
