"""What the tests of the web tools share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from tests.web_tools.site import Site, serve_site
from toolfleet.services.web_tools.crawl_tool import WebCrawlTool
from toolfleet.services.web_tools.models import CrawlRequest, CrawlResult
from toolfleet.settings import Settings

CrawlFn = Callable[..., Coroutine[Any, Any, CrawlResult]]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """An empty site; the test sets `site.answers`."""
    async with serve_site() as running:
        yield running


@pytest.fixture
def web_settings() -> Callable[..., Settings]:
    """Settings of a server on a free port that may fetch the loopback sites of the tests."""

    def make(**overrides: object) -> Settings:
        return Settings.model_validate({"web_port": 0, "web_allow_private": True} | overrides)

    return make


@pytest.fixture
def crawl(web_settings: Callable[..., Settings]) -> CrawlFn:
    """`crawl(url, settings={...}, progress=…, max_pages=…)`: one crawl without the MCP server around it."""

    async def run(
        url: str, *, settings: dict[str, object] | None = None, progress: object = None, **asked: object
    ) -> CrawlResult:
        async def silent(_done: int, _total: int, _message: str) -> None: ...

        request = CrawlRequest.model_validate({"url": url} | asked)
        return await WebCrawlTool(web_settings(**(settings or {}))).crawl(request, progress or silent)  # type: ignore[arg-type]

    return run
