"""robots.txt: what it allows, what it means where it cannot be read, and its pace."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.responses import PlainTextResponse

from tests.web_tools.site import Site, redirect, serve_site
from toolfleet.services.web_tools.address_guard import AddressGuard
from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.fetcher import Fetcher, open_client
from toolfleet.services.web_tools.models import SkipCode
from toolfleet.services.web_tools.pinned_transport import PinnedTransport
from toolfleet.services.web_tools.robots import MAX_CRAWL_DELAY, MAX_ROBOTS_BYTES, RobotsGate
from toolfleet.services.web_tools.urls import parse_web_url

AGENT = "toolfleet-test/1.0"


class Gate:
    """A gate that notes how long it would have waited instead of waiting."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.waits: list[float] = []
        self._gate = RobotsGate(fetcher, AGENT, sleep=self._note)

    async def _note(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def admit(self, url: str) -> None:
        await self._gate.admit(parse_web_url(url))

    async def refusal(self, url: str) -> FetchFailedError:
        with pytest.raises(FetchFailedError) as caught:
            await self.admit(url)
        return caught.value


@asynccontextmanager
async def open_gate(*, allow_private: bool = True) -> AsyncIterator[Gate]:
    guard = AddressGuard(allow_private=allow_private)
    transport = PinnedTransport(guard, ssl_context=ssl.create_default_context(), max_connections=2)
    async with open_client(transport, AGENT, timeout=10) as client:
        yield Gate(Fetcher(client, timeout=10))


def text(*lines: str) -> PlainTextResponse:
    return PlainTextResponse("\n".join(lines))


async def test_rules_allow_and_forbid(site: Site) -> None:
    site.answers["/robots.txt"] = text("User-agent: *", "Disallow: /closed/")
    async with open_gate() as gate:
        await gate.admit(site.url("/open"))
        refused = await gate.refusal(site.url("/closed/page"))
    assert refused.code is SkipCode.ROBOTS
    assert "does not allow it to toolfleet-test" in refused.reason


async def test_rules_for_this_agent_win_over_those_for_all(site: Site) -> None:
    site.answers["/robots.txt"] = text(
        "User-agent: *", "Disallow: /", "", "User-agent: toolfleet-test", "Disallow: /no"
    )
    async with open_gate() as gate:
        await gate.admit(site.url("/yes"))
        await gate.refusal(site.url("/no"))


async def test_a_byte_order_mark_does_not_hide_the_first_line(site: Site) -> None:
    site.answers["/robots.txt"] = PlainTextResponse(b"\xef\xbb\xbfUser-agent: *\nDisallow: /")
    async with open_gate() as gate:
        await gate.refusal(site.url("/any"))


async def test_robots_txt_is_fetched_once_for_an_origin_however_many_ask(site: Site) -> None:
    site.answers["/robots.txt"] = text("User-agent: *", "Allow: /")
    async with open_gate() as gate:
        await asyncio.gather(*(gate.admit(site.url(f"/{number}")) for number in range(8)))
    assert site.paths == ["/robots.txt"]


async def test_each_origin_has_rules_of_its_own(site: Site) -> None:
    site.answers["/robots.txt"] = text("User-agent: *", "Disallow: /")
    async with serve_site() as other, open_gate() as gate:
        await gate.refusal(site.url("/"))
        await gate.admit(other.url("/"))


@pytest.mark.parametrize(("status", "open_to_us"), [(404, True), (410, True), (401, False), (403, False), (503, False)])
async def test_what_an_error_status_means(site: Site, status: int, open_to_us: bool) -> None:
    site.answers["/robots.txt"] = PlainTextResponse("", status_code=status)
    async with open_gate() as gate:
        if open_to_us:
            await gate.admit(site.url("/"))
        else:
            refused = await gate.refusal(site.url("/"))
            assert refused.code is SkipCode.ROBOTS
            assert str(status) in refused.reason


async def test_redirects_of_robots_txt_are_followed(site: Site) -> None:
    site.answers |= {"/robots.txt": redirect("/rules"), "/rules": text("User-agent: *", "Disallow: /closed")}
    async with open_gate() as gate:
        await gate.admit(site.url("/open"))
        await gate.refusal(site.url("/closed"))


async def test_what_stands_after_the_size_limit_is_ignored(site: Site) -> None:
    filler = "#" * MAX_ROBOTS_BYTES
    site.answers["/robots.txt"] = text("User-agent: *", "Disallow: /closed", filler, "Disallow: /open")
    async with open_gate() as gate:
        await gate.admit(site.url("/open"))
        await gate.refusal(site.url("/closed"))


async def test_a_refused_address_is_not_called_a_matter_of_robots(site: Site) -> None:
    async with open_gate(allow_private=False) as gate:
        refused = await gate.refusal(site.url("/"))
    assert refused.code is SkipCode.ADDRESS_REFUSED
    assert site.paths == []


async def test_a_crawl_delay_spaces_requests_and_is_bounded(site: Site) -> None:
    site.answers["/robots.txt"] = text("User-agent: *", "Crawl-delay: 3600")
    async with open_gate() as gate:
        for number in range(3):
            await gate.admit(site.url(f"/{number}"))
    first, second = gate.waits
    assert 0 < first <= MAX_CRAWL_DELAY
    assert MAX_CRAWL_DELAY < second <= 2 * MAX_CRAWL_DELAY


async def test_without_a_crawl_delay_nothing_waits(site: Site) -> None:
    async with open_gate() as gate:
        await gate.admit(site.url("/1"))
        await gate.admit(site.url("/2"))
    assert gate.waits == []
