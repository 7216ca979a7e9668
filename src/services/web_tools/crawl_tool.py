"""The tool `web_crawl`: its arguments and their checks, one crawl for each call, and a count for a graceful end."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import httpx
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.shared.exceptions import MCPError
from mcp.types import INTERNAL_ERROR, CallToolResult, TextContent
from pydantic import AfterValidator, Field

from toolfleet.services.web_tools.address_guard import AddressGuard, Resolver, system_resolver
from toolfleet.services.web_tools.crawler import CONCURRENCY, Crawl, Progress
from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.fetcher import Fetcher, open_client
from toolfleet.services.web_tools.models import MAX_DEPTH, MAX_PAGES, MAX_URL_CHARS, CrawlRequest, CrawlResult
from toolfleet.services.web_tools.pinned_transport import PinnedTransport
from toolfleet.services.web_tools.result_builder import as_text
from toolfleet.services.web_tools.robots import RobotsGate
from toolfleet.services.web_tools.urls import parse_web_url
from toolfleet.settings import Settings


def _checked_url(url: str) -> str:
    try:
        parse_web_url(url)
    except FetchFailedError as error:
        raise ValueError(error.reason) from error
    return url


Url = Annotated[
    str,
    # In the schema only: a pattern that pydantic enforced would answer before `_checked_url` can say what is wrong.
    Field(
        description="Absolute http or https URL of the start page.",
        json_schema_extra={"pattern": "^\\s*[Hh][Tt][Tt][Pp][Ss]?://", "maxLength": MAX_URL_CHARS},
    ),
    AfterValidator(_checked_url),
]


class WebCrawlTool:
    """The tool `web_crawl`, with what its calls share: settings, the address guard, the TLS context, a count.

    Args:
        settings: the `web_*` fields are read.
        resolver: how host names are looked up; tests hand in their own.
    """

    def __init__(self, settings: Settings, *, resolver: Resolver = system_resolver) -> None:
        self._settings = settings
        self._guard = AddressGuard(allow_private=settings.web_allow_private, resolver=resolver)
        self._ssl_context: ssl.SSLContext = httpx.create_ssl_context(trust_env=False)
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        self.active = 0
        self.finished = 0

    async def web_crawl(
        self,
        url: Url,
        ctx: Context[Any, Any],
        max_pages: Annotated[int, Field(ge=1, le=MAX_PAGES, description="Most pages to read.")] = 10,
        max_depth: Annotated[int, Field(ge=0, le=MAX_DEPTH, description="Most links from the start page.")] = 2,
        same_host: Annotated[bool, Field(description="Stay on the host of the start page.")] = True,
    ) -> Annotated[CallToolResult, CrawlResult]:
        """Crawl a web site from one page, breadth first, and return the title and readable text of each page.

        Honours robots.txt and rel=nofollow. Private and loopback addresses are refused. Pages that cannot be read are
        listed under `skipped` with the reason; if the start page cannot be read, the call fails and says why.
        """
        request = CrawlRequest(url=url, max_pages=max_pages, max_depth=max_depth, same_host=same_host)
        with self._counted():
            try:
                result = await self.crawl(request, partial(_report, ctx))
            except FetchFailedError as error:
                raise ToolError(f"{url} could not be read: {error.reason}") from error
        content = TextContent(type="text", text=as_text(result))
        return CallToolResult(content=[content], structured_content=result.model_dump(mode="json"))

    async def drain(self) -> None:
        """Refuse new crawls and return when the running ones have ended; the caller bounds the wait."""
        self.draining = True
        await self._idle.wait()

    async def crawl(self, request: CrawlRequest, progress: Progress) -> CrawlResult:
        """One crawl with these settings.

        Raises:
            FetchFailedError: the start page gave no page.
        """
        settings = self._settings
        transport = PinnedTransport(self._guard, ssl_context=self._ssl_context, max_connections=CONCURRENCY)
        timeout = settings.web_fetch_timeout
        async with open_client(transport, settings.web_user_agent, timeout=timeout) as client:
            fetcher = Fetcher(client, timeout=timeout)
            crawl = Crawl(
                request,
                fetcher=fetcher,
                robots=RobotsGate(fetcher, settings.web_user_agent),
                max_page_bytes=settings.web_max_page_bytes,
                deadline=settings.web_crawl_timeout,
                progress=progress,
            )
            return await crawl.run()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self.draining:
            # A protocol error and not an `is_error` result: the same call on another server, or later, succeeds.
            raise MCPError(code=INTERNAL_ERROR, message="the tool server is shutting down; try again")
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            self.finished += 1
            if not self.active:
                self._idle.set()


async def _report(ctx: Context[Any, Any], done: int, total: int, message: str) -> None:
    await ctx.report_progress(done, total, message)
