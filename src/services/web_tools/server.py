"""The MCP server around the tool, over streamable HTTP with a health page, or over stdio.

Streamable HTTP is served with sessions and event streams, the SDK's defaults, because both are needed: without event
streams no progress is sent, and without sessions a client of a handshake protocol version cannot cancel (its
`notifications/cancelled` comes in a request of its own). Clients of 2026-07-28 need no session; they cancel by closing
the response stream.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.tools import Tool
from mcp.types import ToolAnnotations
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from toolfleet.services.web_tools.crawl_tool import WebCrawlTool
from toolfleet.services.web_tools.http_host import HostedApp, host_app
from toolfleet.settings import Settings

SERVER_NAME = "toolfleet-web-tools"
MCP_PATH = "/mcp"
HEALTH_PATH = "/health"
SEND_GRACE = 1.0
"""Seconds for the results of the last crawls to reach their clients. A client that listens for changes (modern
`subscriptions/listen`) never stops receiving, so the wait can't be for as long as it takes."""

_INSTRUCTIONS = "Reads web sites. web_crawl takes a start URL and gives the title and readable text of each page."


def build_server(settings: Settings, *, tool: WebCrawlTool | None = None) -> MCPServer[object]:
    """The MCP server with its tools and `GET /health`, not yet listening anywhere.

    Args:
        settings: the `web_*` fields are read.
        tool: the tool's state, for a caller that drains it later; made from the settings where none is given.
    """
    crawl = tool if tool is not None else WebCrawlTool(settings)
    server: MCPServer[object] = MCPServer(
        name=SERVER_NAME,
        title="toolfleet web tools",
        instructions=_INSTRUCTIONS,
        version=_version(),
        tools=[_as_mcp_tool(crawl)],
        # Below it the SDK logs each refused call and session, at a level that people read.
        log_level="WARNING",
    )

    async def health(_: Request) -> JSONResponse:
        state = "draining" if crawl.draining else "ok"
        body = {"status": state, "server": SERVER_NAME, "crawls": {"active": crawl.active, "finished": crawl.finished}}
        return JSONResponse(body, status_code=503 if crawl.draining else 200)

    server.custom_route(HEALTH_PATH, methods=["GET"])(health)
    return server


class _Answers:
    """Counts the answers to POST requests that are still being sent; the idle event streams of GET don't count."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open = 0
        self.all_sent = asyncio.Event()
        self.all_sent.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") != "POST":
            return await self._app(scope, receive, send)
        self._open += 1
        self.all_sent.clear()
        try:
            return await self._app(scope, receive, send)
        finally:
            self._open -= 1
            if not self._open:
                self.all_sent.set()


class RunningWebTools:
    """A listening server: `url` for MCP clients, `health_url`, and the steps of its end."""

    def __init__(self, hosted: HostedApp, tool: WebCrawlTool, answers: _Answers) -> None:
        self.hosted = hosted
        self.tool = tool
        self.url = hosted.base_url + MCP_PATH
        self.health_url = hosted.base_url + HEALTH_PATH
        self._answers = answers

    async def drain(self) -> None:
        """Refuse new crawls and return when the running ones have ended and their results were sent.

        The caller bounds the wait for the crawls; that for the sending has a bound of its own (`SEND_GRACE`).
        """
        await self.tool.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(SEND_GRACE):
                await self._answers.all_sent.wait()


@asynccontextmanager
async def serve_web_tools(settings: Settings, *, tool: WebCrawlTool | None = None) -> AsyncIterator[RunningWebTools]:
    """Serve streamable HTTP on `web_host`:`web_port` while the context is open; port 0 takes a free one.

    Leaving the context stops crawls that still run after a short grace; see `RunningWebTools.drain` to wait for them.

    Raises:
        OSError: the address cannot be bound.
    """
    crawl = tool if tool is not None else WebCrawlTool(settings)
    app = _Answers(
        build_server(settings, tool=crawl).streamable_http_app(
            streamable_http_path=MCP_PATH, host=settings.web_host, stateless_http=False, json_response=False
        )
    )
    async with host_app(app, settings.web_host, settings.web_port) as hosted:
        yield RunningWebTools(hosted, crawl, app)


def _as_mcp_tool(crawl: WebCrawlTool) -> Tool:
    tool = Tool.from_function(
        crawl.web_crawl,
        name="web_crawl",
        title="Crawl a web site",
        description=inspect.getdoc(crawl.web_crawl),
        annotations=ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=True),
    )
    # The SDK drops unknown arguments in silence, so a misspelt `max_page` would crawl with the default. Forbidden in
    # the model, they are refused here, and by everybody who checks arguments against the published schema.
    arguments = tool.fn_metadata.arg_model
    arguments.model_config["extra"] = "forbid"
    arguments.model_rebuild(force=True)
    tool.parameters = arguments.model_json_schema(by_alias=True)
    return tool


def _version() -> str:
    try:
        return version("toolfleet")
    except PackageNotFoundError:
        return "0"
