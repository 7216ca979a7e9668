"""The demo's site: what four crawls find on it."""

from __future__ import annotations

import asyncio

from tests.web_tools.conftest import CrawlFn
from toolfleet.services.web_tools.demo_site import CLOSED_PATH, DEMO_SECTIONS, demo_pages, serve_demo_site
from toolfleet.services.web_tools.models import SkipCode, StopReason


def test_the_site_is_large_enough_and_the_same_every_time() -> None:
    assert len(demo_pages()) >= 30
    assert demo_pages() == demo_pages()
    assert demo_pages(1) != demo_pages(2)


async def test_a_crawl_of_each_section_finds_pages_of_its_own(crawl: CrawlFn) -> None:
    async with serve_demo_site(latency_s=0) as base_url:
        results = await asyncio.gather(*(crawl(section.url(base_url)) for section in DEMO_SECTIONS))
    urls = [page.url for result in results for page in result.pages]
    assert len(urls) == len(set(urls)) == 36
    for section, result in zip(DEMO_SECTIONS, results, strict=True):
        assert result.stopped_by is StopReason.COMPLETE
        assert result.pages[0].title == section.title
        assert len({page.title for page in result.pages}) == len(result.pages)
        assert all(page.words > 200 for page in result.pages)
        reasons = {entry.url.removeprefix(base_url): entry.code for entry in result.skipped}
        # `latest` is a page of its section again; of the two, the one that was fetched later is the duplicate.
        twins = reasons.keys() - {CLOSED_PATH}
        assert len(twins) == 1
        assert twins < {f"{section.path}latest", f"{section.path}7"}
        assert reasons == dict.fromkeys(twins, SkipCode.DUPLICATE) | {CLOSED_PATH: SkipCode.ROBOTS}


async def test_the_home_page_leads_to_every_section(crawl: CrawlFn) -> None:
    async with serve_demo_site(latency_s=0) as base_url:
        result = await crawl(base_url + "/", max_pages=100)
    assert result.totals.pages == 37
