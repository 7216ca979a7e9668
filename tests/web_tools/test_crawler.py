"""Which pages a crawl reads, in which bounds, and what it says of the others."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from tests.web_tools.conftest import CrawlFn
from tests.web_tools.site import Site, html, redirect, serve_site
from toolfleet.services.web_tools.crawler import CONCURRENCY
from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.models import CrawlResult, SkipCode, StopReason


def paths(result: CrawlResult) -> list[str]:
    return ["/" + page.url.split("/", 3)[3] for page in result.pages]


def skipped(result: CrawlResult) -> dict[str, SkipCode]:
    return {"/" + entry.url.split("/", 3)[3]: entry.code for entry in result.skipped}


def tree(depth: int, path: str = "/") -> dict[str, str]:
    """Pages that link to two others each, down to the depth."""
    children = [f"{path.rstrip('/')}/{name}" for name in "ab"]
    pages = {path: html(f"Page {path}", *children)}
    return pages if depth == 0 else pages | tree(depth - 1, children[0]) | tree(depth - 1, children[1])


async def test_pages_come_breadth_first_with_their_depth(site: Site, crawl: CrawlFn) -> None:
    site.answers |= tree(3)
    result = await crawl(site.url(), max_depth=2, max_pages=50)
    assert paths(result) == ["/", "/a", "/b", "/a/a", "/a/b", "/b/a", "/b/b"]
    assert [page.depth for page in result.pages] == [0, 1, 1, 2, 2, 2, 2]
    assert result.stopped_by is StopReason.COMPLETE
    assert (result.totals.pages, result.totals.unvisited) == (7, 0)
    assert result.totals.words == sum(page.words for page in result.pages) > 0


async def test_depth_zero_reads_the_start_page_alone(site: Site, crawl: CrawlFn) -> None:
    site.answers |= tree(2)
    assert paths(await crawl(site.url(), max_depth=0)) == ["/"]


@pytest.mark.parametrize("most", [1, 2, 5])
async def test_max_pages_is_exact_and_what_is_left_is_counted(site: Site, crawl: CrawlFn, most: int) -> None:
    site.answers |= tree(3)
    result = await crawl(site.url(), max_pages=most, max_depth=10)
    assert result.totals.pages == len(result.pages) == most
    assert result.stopped_by is StopReason.MAX_PAGES
    assert result.totals.unvisited > 0
    assert len([path for path in site.paths if path != "/robots.txt"]) == most


async def test_a_page_is_fetched_once_however_it_is_linked(site: Site, crawl: CrawlFn) -> None:
    site.answers |= {"/": html("Home", "/a", "/a#x", "./a", "/", ""), "/a": html("A", "/", "/a")}
    assert paths(await crawl(site.url())) == ["/", "/a"]
    assert site.paths == ["/robots.txt", "/", "/a"]


async def test_same_host_stays_and_its_absence_does_not(site: Site, crawl: CrawlFn) -> None:
    async with serve_site({"/": html("Other")}) as other:
        site.answers["/"] = html("Home", other.url(), "/a")
        site.answers["/a"] = html("A")
        assert paths(await crawl(site.url())) == ["/", "/a"]
        assert other.paths == []
        everywhere = await crawl(site.url(), same_host=False)
    assert [page.title for page in everywhere.pages] == ["Home", "Other", "A"]


async def test_where_the_start_page_redirects_to_is_the_site(site: Site, crawl: CrawlFn) -> None:
    async with serve_site({"/": html("Moved here", "/a"), "/a": html("A")}) as new:
        site.answers["/"] = redirect(new.url())
        result = await crawl(site.url())
    assert [page.title for page in result.pages] == ["Moved here", "A"]
    assert result.start_url == site.url()


async def test_a_link_that_redirects_off_the_site_is_skipped_unfetched(site: Site, crawl: CrawlFn) -> None:
    async with serve_site({"/": html("Other")}) as other:
        site.answers |= {"/": html("Home", "/out"), "/out": redirect(other.url())}
        result = await crawl(site.url())
        assert other.paths == []
    assert skipped(result) == {"/out": SkipCode.OFF_SITE}


async def test_each_page_that_cannot_be_read_is_listed_with_its_reason(site: Site, crawl: CrawlFn) -> None:
    site.answers |= {
        "/robots.txt": PlainTextResponse("User-agent: *\nDisallow: /closed"),
        "/": html("Home", "/closed", "/gone", "/pdf", "/large", "/loop", "/again", "/a"),
        "/pdf": Response(b"%PDF", media_type="application/pdf"),
        "/large": Response(b"x" * 5000, media_type="text/plain"),
        "/loop": redirect("/loop"),
        "/again": redirect("/"),
        "/a": html("A"),
    }
    result = await crawl(site.url(), settings={"web_max_page_bytes": 4096})
    assert paths(result) == ["/", "/a"]
    assert skipped(result) == {
        "/closed": SkipCode.ROBOTS,
        "/gone": SkipCode.HTTP_STATUS,
        "/pdf": SkipCode.CONTENT,
        "/large": SkipCode.TOO_LARGE,
        "/loop": SkipCode.REDIRECT,
        "/again": SkipCode.DUPLICATE,
    }
    assert result.totals.skipped == 6
    assert "/closed" not in site.paths


async def test_a_page_reached_by_redirect_is_not_read_again_from_the_queue(site: Site, crawl: CrawlFn) -> None:
    fillers = [f"/{number}" for number in range(CONCURRENCY - 1)]
    site.answers |= {path: html(path) for path in fillers}
    site.answers |= {"/": html("Home", "/short", *fillers, "/long"), "/short": redirect("/long"), "/long": html("Long")}
    result = await crawl(site.url())
    assert [page.title for page in result.pages].count("Long") == 1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (PlainTextResponse("", status_code=500), SkipCode.HTTP_STATUS),
        (Response(b"GIF89a", media_type="image/gif"), SkipCode.CONTENT),
        (redirect("http://169.254.169.254/"), SkipCode.ADDRESS_REFUSED),
    ],
)
async def test_a_start_page_that_cannot_be_read_fails_the_crawl(
    site: Site, crawl: CrawlFn, answer: Response, code: SkipCode
) -> None:
    site.answers["/"] = answer
    with pytest.raises(FetchFailedError) as caught:
        await crawl(site.url())
    assert caught.value.code is code


async def test_a_private_start_page_is_refused_without_the_setting(site: Site, crawl: CrawlFn) -> None:
    with pytest.raises(FetchFailedError, match="loopback") as caught:
        await crawl(site.url(), settings={"web_allow_private": False})
    assert caught.value.code is SkipCode.ADDRESS_REFUSED
    assert site.paths == []


async def test_a_site_of_broken_links_ends_the_crawl(site: Site, crawl: CrawlFn) -> None:
    site.answers["/"] = html("Home", *(f"/gone/{number}" for number in range(100)))
    result = await crawl(site.url(), max_pages=2)
    assert result.stopped_by is StopReason.FETCH_LIMIT
    assert result.totals.pages == 1
    assert result.totals.skipped + result.totals.unvisited == 100


async def test_a_crawl_out_of_time_gives_what_it_has(site: Site, crawl: CrawlFn) -> None:
    site.answers |= {"/": html("Home", "/a", "/slow"), "/a": html("A"), "/slow": site.hold}
    result = await crawl(site.url(), settings={"web_crawl_timeout": 2})
    assert paths(result) == ["/", "/a"]
    assert result.stopped_by is StopReason.DEADLINE
    assert result.totals.unvisited == 1
    await asyncio.wait_for(site.abandoned.wait(), 10)


async def test_a_start_page_out_of_time_fails_the_crawl(site: Site, crawl: CrawlFn) -> None:
    site.answers["/"] = site.hold
    with pytest.raises(FetchFailedError) as caught:
        await crawl(site.url(), settings={"web_crawl_timeout": 0.2})
    assert caught.value.code is SkipCode.TIMEOUT


async def test_fetches_run_at_once_up_to_the_limit(site: Site, crawl: CrawlFn) -> None:
    at_once = asyncio.Barrier(CONCURRENCY)

    async def together(_: Request) -> Response:
        # Passes only when as many requests as the limit are here at the same time.
        await asyncio.wait_for(at_once.wait(), 10)
        return PlainTextResponse("met")

    links = [f"/{number}" for number in range(2 * CONCURRENCY)]
    site.answers |= {"/": html("Home", *links)} | dict.fromkeys(links, together)
    assert (await crawl(site.url(), max_pages=50)).totals.pages == 1 + 2 * CONCURRENCY


async def test_progress_counts_pages_towards_a_bound_that_becomes_exact(site: Site, crawl: CrawlFn) -> None:
    told: list[tuple[int, int, str]] = []

    async def progress(done: int, total: int, message: str) -> None:
        told.append((done, total, message))

    site.answers |= tree(1)
    await crawl(site.url(), max_pages=20, max_depth=1, progress=progress)
    assert [done for done, _, _ in told] == [0, 1, 2, 3]
    assert [total for _, total, _ in told] == [20, 3, 3, 3]
    assert told[0][2] == f"fetching {site.url()}"
    assert {message for _, _, message in told[1:]} == {f"read {site.url(path)}" for path in ("/", "/a", "/b")}


async def test_a_cancelled_crawl_closes_what_it_was_fetching(site: Site, crawl: CrawlFn) -> None:
    site.answers |= {"/": html("Home", "/slow"), "/slow": site.hold}
    running = asyncio.create_task(crawl(site.url()))
    await asyncio.wait_for(site.held.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.wait_for(site.abandoned.wait(), 10)
