"""Collects pages and skipped URLs into a result of bounded size, and writes the same for people to read."""

from __future__ import annotations

from toolfleet.services.web_tools.fetcher import Fetched
from toolfleet.services.web_tools.models import (
    MAX_URL_CHARS,
    CrawledPage,
    CrawlResult,
    CrawlTotals,
    SkipCode,
    SkippedUrl,
    StopReason,
)
from toolfleet.services.web_tools.page_reader import PageContent

MAX_PAGE_CHARS = 20_000
"""Text kept of one page: about 3,000 words, longer than most articles."""
MAX_TEXT_BYTES = 1 << 20
"""Text kept of all pages together, in UTF-8. JSON escapes can triple it and stay under the 8 MiB of a tool result."""
MAX_SKIPPED = 50
MAX_REASON_CHARS = 300
MAX_EXCERPT_CHARS = 2_000
"""Of one page in the readable text; the structured content has the rest, so sending it twice would serve nobody."""

_STOPPED = {
    StopReason.COMPLETE: "every page within reach was read",
    StopReason.MAX_PAGES: "max_pages was reached",
    StopReason.FETCH_LIMIT: "too many links led to no page",
    StopReason.DEADLINE: "the time of one crawl was up",
}


class ResultBuilder:
    """The result of one crawl in the making. Pages may be added in any order; they come out breadth first."""

    def __init__(self, start_url: str) -> None:
        self._start_url = start_url
        self._pages: list[tuple[tuple[int, ...], CrawledPage]] = []
        self._skipped: list[SkippedUrl] = []
        self._skipped_count = 0
        self._bytes_left = MAX_TEXT_BYTES

    @property
    def page_count(self) -> int:
        """Pages added so far."""
        return len(self._pages)

    def add_page(self, path: tuple[int, ...], fetched: Fetched, content: PageContent) -> None:
        """Add a page; its text is cut to what one page, and what is left of the whole result, may take.

        `path` is the place of each link followed to the page, from the start page down; its length is the depth.
        """
        text = self._fit(content.text)
        page = CrawledPage(
            url=str(fetched.url),
            status=fetched.status,
            title=content.title,
            text=text,
            truncated=content.cut or len(text) < len(content.text),
            words=len(content.text.split()),
            depth=len(path),
            fetched_ms=fetched.elapsed_ms,
        )
        self._pages.append((path, page))

    def skip(self, url: str, code: SkipCode, reason: str) -> None:
        """Count a URL that gave no page, and list it while the list has room."""
        self._skipped_count += 1
        if len(self._skipped) < MAX_SKIPPED:
            self._skipped.append(SkippedUrl(url=url[:MAX_URL_CHARS], code=code, reason=reason[:MAX_REASON_CHARS]))

    def build(self, *, stopped_by: StopReason, unvisited: int, duration_s: float) -> CrawlResult:
        """The finished result."""
        pages = [page for _, page in sorted(self._pages, key=lambda entry: (len(entry[0]), entry[0]))]
        totals = CrawlTotals(
            pages=len(pages),
            words=sum(page.words for page in pages),
            skipped=self._skipped_count,
            unvisited=unvisited,
        )
        return CrawlResult(
            start_url=self._start_url,
            pages=pages,
            totals=totals,
            skipped=self._skipped,
            stopped_by=stopped_by,
            duration_s=duration_s,
        )

    def _fit(self, text: str) -> str:
        kept = text[:MAX_PAGE_CHARS].encode()[: self._bytes_left]
        self._bytes_left -= len(kept)
        # The cut can fall inside a character; what is left of it is dropped.
        return kept.decode(errors="ignore")


def as_text(result: CrawlResult) -> str:
    """The result as Markdown: a summary, an excerpt of each page, what was skipped and why."""
    totals = result.totals
    summary = (
        f"{totals.pages} pages, {totals.words} words in {result.duration_s:.1f} s; "
        f"{totals.skipped} skipped, {totals.unvisited} links not visited; {_STOPPED[result.stopped_by]}."
    )
    parts = [f"# Crawl of {result.start_url}", summary]
    for page in result.pages:
        excerpt = page.text[:MAX_EXCERPT_CHARS]
        more = " […]" if page.truncated or len(excerpt) < len(page.text) else ""
        parts.append(f"## {page.title}\n{page.url}\n\n{excerpt}{more}".rstrip())
    if result.skipped:
        parts.append("## Skipped\n" + "\n".join(f"- {entry.url}: {entry.reason}" for entry in result.skipped))
    return "\n\n".join(parts)
