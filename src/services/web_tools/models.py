"""What a crawl takes and what it gives: the shapes on the wire of `web_crawl`.

The result models are the tool's published output schema, so a field added here reaches every client.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_URL_CHARS = 2048
"""Longest URL fetched or reported; the length that search engines and proxies commonly accept."""
MAX_PAGES = 100
MAX_DEPTH = 10


class SkipCode(StrEnum):
    """Why a URL gave no page. The value is for programs; the reason beside it is for people."""

    ADDRESS_REFUSED = "address_refused"
    """The host is, or resolves to, an address that may not be fetched."""
    BAD_URL = "bad_url"
    """Not a URL that can be fetched: another scheme, credentials in it, malformed, too long."""
    ROBOTS = "robots"
    """robots.txt disallows it, or could not be read where the rules say that means no."""
    CONNECTION = "connection"
    """Name not found, refused, reset, TLS failure, or an answer that is not HTTP."""
    TIMEOUT = "timeout"
    """No complete answer within the fetch time-out."""
    REDIRECT = "redirect"
    """A loop, more hops than allowed, or a redirect that names no target."""
    OFF_SITE = "off_site"
    """A redirect left the site while `same_host` was asked for."""
    HTTP_STATUS = "http_status"
    """An answer other than 2xx."""
    TOO_LARGE = "too_large"
    """The body, as sent or unpacked, is over the size limit."""
    CONTENT = "content"
    """Not text, an encoding that was not asked for, or a damaged body."""
    DUPLICATE = "duplicate"
    """It redirects to a page that was read already."""


class StopReason(StrEnum):
    """What ended the crawl."""

    COMPLETE = "complete"
    """Every page within reach was read."""
    MAX_PAGES = "max_pages"
    """`max_pages` pages were read and there were more links."""
    FETCH_LIMIT = "fetch_limit"
    """Too many fetches gave no page."""
    DEADLINE = "deadline"
    """The crawl's time was up; what was read until then is the result."""


class CrawlRequest(BaseModel):
    """The arguments of one crawl.

    Raises:
        pydantic.ValidationError: a number is out of range.
    """

    model_config = ConfigDict(frozen=True)

    url: str
    max_pages: Annotated[int, Field(ge=1, le=MAX_PAGES)] = 10
    max_depth: Annotated[int, Field(ge=0, le=MAX_DEPTH)] = 2
    same_host: bool = True


class CrawledPage(BaseModel):
    """One page that was read."""

    model_config = ConfigDict(frozen=True)

    url: str = Field(description="The URL after redirects, without its fragment.")
    status: int = Field(description="The HTTP status, 200 to 299.")
    title: str
    text: str = Field(description="The readable text, without navigation and boilerplate.")
    truncated: bool = Field(description="Whether `text` is shorter than what was found on the page.")
    words: int = Field(description="Words of the whole text, also where `text` is truncated.")
    depth: int = Field(description="Links between the start page (0) and this one.")
    fetched_ms: int = Field(description="Milliseconds from the request to the end of the body, redirects included.")


class SkippedUrl(BaseModel):
    """A URL that was tried, or would have been, and gave no page."""

    model_config = ConfigDict(frozen=True)

    url: str
    code: SkipCode
    reason: str


class CrawlTotals(BaseModel):
    """Counts over the whole crawl; `skipped` counts also those that the bounded list leaves out."""

    model_config = ConfigDict(frozen=True)

    pages: int
    words: int
    skipped: int
    unvisited: int = Field(description="Links found within reach and not visited when the crawl ended.")


class CrawlResult(BaseModel):
    """The structured content of a `web_crawl` result; pages stand in the order in which they were found."""

    model_config = ConfigDict(frozen=True)

    start_url: str
    pages: list[CrawledPage]
    totals: CrawlTotals
    skipped: list[SkippedUrl] = Field(description="At most the first 50; `totals.skipped` has the count.")
    stopped_by: StopReason
    duration_s: float
