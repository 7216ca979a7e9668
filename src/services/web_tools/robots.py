"""robots.txt: which URLs a site lets us fetch, and how fast.

The text is read by the standard library's `urllib.robotparser`, but fetched by us: with the address guard, the size
limit and the time-out of every other fetch. What an unreadable robots.txt means follows `RobotFileParser.read` (401
and 403 forbid everything, other 4xx allow everything) and RFC 9309, section 2.3.1.4 (a server error or no answer
forbids everything).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.robotparser import RobotFileParser

import httpx

from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.fetcher import Fetched, Fetcher, Wanted, status_line
from toolfleet.services.web_tools.models import SkipCode
from toolfleet.services.web_tools.urls import origin_of

MAX_ROBOTS_BYTES = 500 * 1024
"""RFC 9309, section 2.5: at least 500 KiB are read; the rest is ignored."""
MAX_CRAWL_DELAY = 5.0
"""Seconds. A longer delay is cut to this, or a crawl of a few pages would outlast the call that asked for it."""


@dataclass(frozen=True, slots=True)
class _Rules:
    allows: Callable[[str], bool]
    delay: float = 0.0
    unreadable: FetchFailedError | None = None


class _Origin:
    """What is known of one origin. The lock makes one fetch of its robots.txt and one queue for its crawl-delay."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.rules: _Rules | None = None
        self.next_at = 0.0


class RobotsGate:
    """The rules of every origin that one crawl meets, each fetched once.

    Args:
        fetcher: fetches the robots.txt files.
        user_agent: its product token, before the slash, is what rules are matched against.
        sleep: how to wait for a crawl-delay; tests hand in their own.
    """

    def __init__(
        self, fetcher: Fetcher, user_agent: str, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._fetcher = fetcher
        self._agent = user_agent
        self._sleep = sleep
        self._origins: dict[str, _Origin] = {}

    async def admit(self, url: httpx.URL) -> None:
        """Return when `url` may be requested, after the site's crawl-delay where it has one.

        Raises:
            FetchFailedError: `ROBOTS`, the rules forbid it; or why robots.txt could not be fetched.
        """
        origin = self._origins.setdefault(origin_of(url), _Origin())
        async with origin.lock:
            if origin.rules is None:
                origin.rules = await self._load(url)
            rules = origin.rules
            if rules.unreadable is not None:
                raise rules.unreadable
            if not rules.allows(str(url)):
                token = self._agent.partition("/")[0]
                raise FetchFailedError(SkipCode.ROBOTS, f"robots.txt of {origin_of(url)} does not allow it to {token}")
            await self._keep_pace(origin, rules.delay)

    async def _keep_pace(self, origin: _Origin, delay: float) -> None:
        if delay <= 0:
            return
        now = asyncio.get_running_loop().time()
        wait = origin.next_at - now
        origin.next_at = max(now, origin.next_at) + delay
        if wait > 0:
            await self._sleep(wait)

    async def _load(self, url: httpx.URL) -> _Rules:
        address = httpx.URL(f"{origin_of(url)}/robots.txt")
        try:
            fetched = await self._fetcher.fetch(address, Wanted(MAX_ROBOTS_BYTES, cut=True), _admit_all)
        except FetchFailedError as error:
            return _Rules(allows=_nothing, unreadable=_why_unreadable(address, error))
        return self._rules_from(address, fetched)

    def _rules_from(self, address: httpx.URL, fetched: Fetched) -> _Rules:
        if fetched.ok:
            parser = RobotFileParser(str(address))
            # utf-8-sig: a byte order mark would hide the first line, often the User-agent.
            parser.parse(fetched.body.decode("utf-8-sig", "replace").splitlines())
            delay = parser.crawl_delay(self._agent)
            return _Rules(
                allows=lambda target: parser.can_fetch(self._agent, target),
                delay=min(float(delay or 0), MAX_CRAWL_DELAY),
            )
        if 400 <= fetched.status < 500 and fetched.status not in (401, 403):
            return _Rules(allows=_everything)
        reason = f"{address} answered {status_line(fetched.status)}, so the site counts as closed to crawlers"
        return _Rules(allows=_nothing, unreadable=FetchFailedError(SkipCode.ROBOTS, reason))


def _why_unreadable(address: httpx.URL, error: FetchFailedError) -> FetchFailedError:
    # The page would have failed in the same way: a refused address is a refused address, not a matter of robots.txt.
    if error.code in (SkipCode.ADDRESS_REFUSED, SkipCode.CONNECTION, SkipCode.TIMEOUT):
        return error
    return FetchFailedError(SkipCode.ROBOTS, f"{address} could not be read: {error.reason}")


async def _admit_all(_: httpx.URL) -> None:
    """The hops of a robots.txt are not subject to robots.txt; the address guard judges them like any other."""


def _everything(_: str) -> bool:
    return True


def _nothing(_: str) -> bool:
    return False
