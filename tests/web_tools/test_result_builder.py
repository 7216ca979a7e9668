"""Results stay in bounds and say what was left out."""

from __future__ import annotations

import httpx

from toolfleet.services.web_tools.fetcher import Fetched
from toolfleet.services.web_tools.models import CrawlResult, SkipCode, StopReason
from toolfleet.services.web_tools.page_reader import PageContent
from toolfleet.services.web_tools.result_builder import (
    MAX_PAGE_CHARS,
    MAX_REASON_CHARS,
    MAX_SKIPPED,
    MAX_TEXT_BYTES,
    ResultBuilder,
    as_text,
)

RESULT_LIMIT = 8 << 20


def fetched(number: int = 0) -> Fetched:
    return Fetched(httpx.URL(f"http://example.org/{number}"), 200, "text/html", None, "", b"", 5)


def built(builder: ResultBuilder) -> CrawlResult:
    return builder.build(stopped_by=StopReason.COMPLETE, unvisited=0, duration_s=1.0)


def test_a_long_text_is_cut_and_its_words_are_all_counted() -> None:
    builder = ResultBuilder("http://example.org/")
    builder.add_page((), fetched(), PageContent("Long", "word " * MAX_PAGE_CHARS))
    (page,) = built(builder).pages
    assert len(page.text) == MAX_PAGE_CHARS
    assert page.truncated
    assert page.words == MAX_PAGE_CHARS


def test_a_short_text_is_whole() -> None:
    builder = ResultBuilder("http://example.org/")
    builder.add_page((), fetched(), PageContent("Short", "two words"))
    (page,) = built(builder).pages
    assert (page.text, page.truncated, page.words, page.depth) == ("two words", False, 2, 0)


def test_a_page_read_in_part_is_truncated() -> None:
    builder = ResultBuilder("http://example.org/")
    builder.add_page((), fetched(), PageContent("Part", "two words", cut=True))
    assert built(builder).pages[0].truncated


def test_the_largest_result_stays_under_the_limit_of_a_tool_result() -> None:
    builder = ResultBuilder("http://example.org/")
    for number in range(100):
        builder.add_page((number,), fetched(number), PageContent("T" * 300, "\U0001f4a1" * MAX_PAGE_CHARS))
    result = built(builder)
    assert sum(len(page.text.encode()) for page in result.pages) <= MAX_TEXT_BYTES
    assert result.pages[-1].truncated
    # As the SDK sends it: JSON with every character beyond ASCII escaped, and the readable text beside it.
    sent = len(result.model_dump_json(ensure_ascii=True)) + 2 * len(as_text(result).encode("ascii", "backslashreplace"))
    assert sent < RESULT_LIMIT


def test_the_list_of_skipped_urls_is_bounded_and_the_count_is_not() -> None:
    builder = ResultBuilder("http://example.org/")
    for number in range(MAX_SKIPPED + 10):
        builder.skip(f"http://example.org/{number}", SkipCode.CONNECTION, "r" * 1000)
    result = built(builder)
    assert len(result.skipped) == MAX_SKIPPED
    assert result.totals.skipped == MAX_SKIPPED + 10
    assert len(result.skipped[0].reason) == MAX_REASON_CHARS


def test_the_readable_text_tells_pages_and_reasons() -> None:
    builder = ResultBuilder("http://example.org/")
    builder.add_page((), fetched(), PageContent("A title", "Some text"))
    builder.skip("http://example.org/x", SkipCode.ROBOTS, "robots.txt says no")
    text = as_text(built(builder))
    for part in ("# Crawl of http://example.org/", "1 pages, 2 words", "## A title", "Some text", "robots.txt says no"):
        assert part in text
