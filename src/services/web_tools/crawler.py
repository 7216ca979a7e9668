"""The crawl itself: breadth first from one URL, a few fetches at a time, within bounds on everything.

A `Crawl` lives for one call. One loop decides what is fetched next and is the only one to touch its state; the
fetches it starts are its children in a task group, so a cancelled call leaves none of them running.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.fetcher import Fetched, Fetcher, Wanted, status_line
from toolfleet.services.web_tools.models import CrawlRequest, CrawlResult, SkipCode, StopReason
from toolfleet.services.web_tools.page_reader import READABLE_TYPES, PageContent, read_page
from toolfleet.services.web_tools.result_builder import ResultBuilder
from toolfleet.services.web_tools.robots import RobotsGate
from toolfleet.services.web_tools.urls import SiteKey, parse_web_url, site_of

CONCURRENCY = 4
"""Fetches of one crawl at once: polite to one site, and enough to hide the latency of most."""
MAX_FRONTIER = 10_000
"""Links remembered for a later visit; a hundred times what the largest crawl reads."""

Progress = Callable[[int, int, str], Awaitable[None]]
"""`(pages read, best known bound of pages, what is being said)`; the first number only grows."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL to visit.

    `path` is the place of each link on its page, from the start page down: sorted by it, pages come out breadth first
    whichever fetch ended first.
    """

    url: httpx.URL
    path: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """Links between the start page (0) and this one."""
        return len(self.path)


@dataclass(frozen=True, slots=True)
class _Visit:
    """What came of a target: a page, or why there is none."""

    target: _Target
    outcome: tuple[Fetched, PageContent] | FetchFailedError


class Crawl:
    """One crawl of one site, or of everything in reach where `same_host` is off.

    Args:
        request: what the caller asked for.
        fetcher: fetches pages and robots.txt files alike.
        robots: the rules of the sites met.
        max_page_bytes: of one page.
        deadline: seconds after which the crawl ends with what it has.
        progress: told of the start and of each page; a slow listener slows the crawl, not its fetches.
    """

    def __init__(
        self,
        request: CrawlRequest,
        *,
        fetcher: Fetcher,
        robots: RobotsGate,
        max_page_bytes: int,
        deadline: float,
        progress: Progress,
    ) -> None:
        self._request = request
        self._fetcher = fetcher
        self._robots = robots
        self._wanted = Wanted(max_page_bytes, content_types=READABLE_TYPES)
        self._deadline = deadline
        self._progress = progress
        self._start = parse_web_url(request.url)
        self._site: SiteKey | None = None
        self._frontier: deque[_Target] = deque()
        self._running: dict[asyncio.Task[_Visit], _Target] = {}
        self._seen = {self._start}
        self._read: set[httpx.URL] = set()
        self._fetches = 0
        self._result = ResultBuilder(str(self._start))

    async def run(self) -> CrawlResult:
        """Crawl until done, out of bounds or out of time.

        Raises:
            FetchFailedError: the start page gave no page; a later one that does not is in `skipped` instead.
        """
        started = time.perf_counter()
        await self._progress(0, self._request.max_pages, f"fetching {self._start}")
        stopped_by: StopReason | None = None
        try:
            async with asyncio.timeout(self._deadline):
                await self._read_start_page()
                await self._follow_links()
        except TimeoutError:
            if not self._result.page_count:
                raise FetchFailedError(SkipCode.TIMEOUT, f"no answer within {self._deadline:g} s") from None
            stopped_by = StopReason.DEADLINE
        return self._result.build(
            stopped_by=stopped_by or self._why_stopped(),
            unvisited=len(self._frontier) + len(self._running),
            duration_s=round(time.perf_counter() - started, 3),
        )

    async def _read_start_page(self) -> None:
        visit = await self._visit(_Target(self._start))
        if isinstance(visit.outcome, FetchFailedError):
            raise visit.outcome
        await self._absorb(visit)

    async def _follow_links(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                while (target := self._next_target()) is not None:
                    self._running[group.create_task(self._visit(target))] = target
                if not self._running:
                    return
                done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del self._running[task]
                    await self._absorb(task.result())

    def _next_target(self) -> _Target | None:
        """What to fetch next, if anything may be: each running fetch is counted as the page it may become."""
        running = len(self._running)
        if running >= CONCURRENCY or self._result.page_count + running >= self._request.max_pages:
            return None
        if self._fetches >= self._fetch_limit:
            return None
        while self._frontier:
            target = self._frontier.popleft()
            if target.url not in self._read:
                return target
        return None

    @property
    def _fetch_limit(self) -> int:
        # A site of broken links ends the crawl as well; some margin lets a normal share of them pass.
        return 3 * self._request.max_pages + 10

    async def _visit(self, target: _Target) -> _Visit:
        self._fetches += 1
        try:
            fetched = await self._fetcher.fetch(target.url, self._wanted, self._admit)
            if not fetched.ok:
                raise FetchFailedError(SkipCode.HTTP_STATUS, f"it answered {status_line(fetched.status)}")
            return _Visit(target, (fetched, await asyncio.to_thread(read_page, fetched)))
        except FetchFailedError as error:
            return _Visit(target, error)

    async def _admit(self, url: httpx.URL) -> None:
        if not self._in_scope(url):
            raise FetchFailedError(SkipCode.OFF_SITE, f"it redirects to another host, {url}")
        await self._robots.admit(url)

    def _in_scope(self, url: httpx.URL) -> bool:
        # Until the start page is read there is no site: where it redirects to (`www.`) is the site that is meant.
        return not self._request.same_host or self._site is None or site_of(url) == self._site

    async def _absorb(self, visit: _Visit) -> None:
        match visit.outcome:
            case FetchFailedError() as error:
                self._result.skip(str(visit.target.url), error.code, error.reason)
            case (fetched, _) if fetched.url in self._read:
                reason = f"it redirects to {fetched.url}, which was read already"
                self._result.skip(str(visit.target.url), SkipCode.DUPLICATE, reason)
            case (fetched, content):
                self._add_page(visit.target, fetched, content)
                await self._progress(self._result.page_count, self._bound(), f"read {fetched.url}")

    def _add_page(self, target: _Target, fetched: Fetched, content: PageContent) -> None:
        if self._site is None:
            self._site = site_of(fetched.url)
        self._read.add(fetched.url)
        self._seen.add(fetched.url)
        self._result.add_page(target.path, fetched, content)
        if target.depth >= self._request.max_depth:
            return
        for place, link in enumerate(content.links):
            if link in self._seen or len(self._frontier) >= MAX_FRONTIER or not self._in_scope(link):
                continue
            self._seen.add(link)
            self._frontier.append(_Target(link, (*target.path, place)))

    def _bound(self) -> int:
        """Pages there can be at most: exact once nothing that is still to be read may bring new links."""
        ahead = [*self._running.values(), *self._frontier]
        if any(target.depth < self._request.max_depth for target in ahead):
            return self._request.max_pages
        return min(self._request.max_pages, self._result.page_count + len(ahead))

    def _why_stopped(self) -> StopReason:
        if not self._frontier:
            return StopReason.COMPLETE
        return StopReason.MAX_PAGES if self._result.page_count >= self._request.max_pages else StopReason.FETCH_LIMIT
