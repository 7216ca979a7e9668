"""One GET, followed through its redirects, every hop checked like a first request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

import httpx

from toolfleet.services.web_tools.body_reader import ACCEPT_ENCODING, read_body
from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.models import SkipCode
from toolfleet.services.web_tools.urls import parse_web_url

MAX_REDIRECTS = 5
"""Also what RFC 9309, section 2.3.1.2, asks of a robots.txt."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

Admit = Callable[[httpx.URL], Awaitable[None]]
"""Called with each hop before it is requested; raises FetchFailedError where it may not be."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A complete answer.

    `body` is unpacked, and empty where the status is not 2xx; `content_type` is lower case without parameters, empty
    where the server sent none; `charset` is the one of the header.
    """

    url: httpx.URL
    status: int
    content_type: str
    charset: str | None
    robots_tag: str
    body: bytes
    elapsed_ms: int

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is accepted as an answer: its size in bytes, whether a longer one is cut, and its content types."""

    max_bytes: int
    cut: bool = False
    content_types: frozenset[str] | None = None
    """None accepts every type; an answer without a type is accepted either way."""


class Fetcher:
    """Fetches with one client, which carries the transport, the user agent and the cookies of one crawl.

    Args:
        client: with `follow_redirects=False`; see `open_client`.
        timeout: seconds for one hop, from the lookup of its name to the last byte of its body.
    """

    def __init__(self, client: httpx.AsyncClient, *, timeout: float) -> None:
        self._client = client
        self._timeout = timeout

    async def fetch(self, url: httpx.URL, wanted: Wanted, admit: Admit) -> Fetched:
        """GET `url` and what it redirects to, at most `MAX_REDIRECTS` hops.

        Raises:
            FetchFailedError: with the class and the reason; whatever `admit` raises passes through.
        """
        started = time.perf_counter()
        seen = {url}
        for _ in range(MAX_REDIRECTS + 1):
            await admit(url)
            answer = await self._hop(url, wanted, started)
            if isinstance(answer, Fetched):
                return answer
            if answer in seen:
                raise FetchFailedError(SkipCode.REDIRECT, f"it redirects in a loop, back to {answer}")
            seen.add(answer)
            url = answer
        raise FetchFailedError(SkipCode.REDIRECT, f"it redirects more than {MAX_REDIRECTS} times, last to {url}")

    async def _hop(self, url: httpx.URL, wanted: Wanted, started: float) -> Fetched | httpx.URL:
        try:
            async with asyncio.timeout(self._timeout), self._client.stream("GET", url) as response:
                if response.status_code in _REDIRECTS:
                    return _target(response)
                body = await _wanted_body(response, wanted)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise FetchFailedError(SkipCode.TIMEOUT, f"no complete answer within {self._timeout:g} s") from error
        except httpx.InvalidURL as error:
            raise FetchFailedError(SkipCode.REDIRECT, f"it redirects to something that is no URL: {error}") from error
        except httpx.HTTPError as error:
            detail = str(error) or type(error).__name__
            raise FetchFailedError(SkipCode.CONNECTION, f"the connection failed: {detail}") from error
        return Fetched(
            url=url,
            status=response.status_code,
            content_type=_media_type(response),
            charset=response.charset_encoding,
            robots_tag=response.headers.get("x-robots-tag", "").lower(),
            body=body,
            elapsed_ms=round((time.perf_counter() - started) * 1000),
        )


@asynccontextmanager
async def open_client(
    transport: httpx.AsyncBaseTransport, user_agent: str, *, timeout: float
) -> AsyncIterator[httpx.AsyncClient]:
    """The client of one crawl: no redirects of its own, no proxies or credentials from the environment.

    `timeout`, in seconds, bounds each step of a request (connect, one read); `Fetcher` bounds the whole.
    """
    headers = {
        "user-agent": user_agent,
        "accept": "text/html,application/xhtml+xml,text/plain;q=0.8,*/*;q=0.1",
        "accept-encoding": ACCEPT_ENCODING,
    }
    async with httpx.AsyncClient(
        transport=transport, headers=headers, follow_redirects=False, trust_env=False, timeout=timeout
    ) as client:
        yield client


def status_line(status: int) -> str:
    """`HTTP 404 Not Found`; just the number where it has no standard phrase."""
    try:
        return f"HTTP {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status}"


def _target(response: httpx.Response) -> httpx.URL:
    location = response.headers.get("location", "")
    if not location:
        raise FetchFailedError(SkipCode.REDIRECT, f"{status_line(response.status_code)} without a Location")
    try:
        return parse_web_url(str(response.url.join(location)))
    except FetchFailedError as error:
        raise FetchFailedError(error.code, f"it redirects to a URL that is not fetched: {error.reason}") from error


async def _wanted_body(response: httpx.Response, wanted: Wanted) -> bytes:
    if not response.is_success:
        return b""
    kind = _media_type(response)
    if wanted.content_types is not None and kind and kind not in wanted.content_types:
        raise FetchFailedError(SkipCode.CONTENT, f"its content type {kind[:80]} is not readable text")
    return await read_body(response, wanted.max_bytes, cut=wanted.cut)


def _media_type(response: httpx.Response) -> str:
    value: str = response.headers.get("content-type", "")
    return value.partition(";")[0].strip().lower()
