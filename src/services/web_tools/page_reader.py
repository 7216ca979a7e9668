"""A fetched page to what a reader wants of it: title, readable text, links.

Pure and synchronous; the crawler runs it in a thread, since extraction of a long page takes a good part of a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import httpx
import trafilatura
from lxml import etree, html  # type: ignore[import-untyped]  # lxml ships no types
from trafilatura.metadata import extract_title

from toolfleet.services.web_tools.charsets import decode_text
from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.fetcher import Fetched
from toolfleet.services.web_tools.models import SkipCode
from toolfleet.services.web_tools.urls import resolve_link

HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
PLAIN_TYPES = frozenset(
    {"text/plain", "text/markdown", "text/x-markdown", "text/csv", "text/xml", "application/xml", "application/json"}
)
READABLE_TYPES = HTML_TYPES | PLAIN_TYPES

MAX_HTML_CHARS = 2 << 20
"""Of one page, what is parsed: extraction of 2 Mi characters of adverse markup takes about 10 s of one core."""
MAX_TITLE_CHARS = 300
MAX_LINKS = 1000
"""Distinct links taken from one page."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LOOKS_LIKE_HTML = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PageContent:
    """What was found on a page. `links` are absolute, in page order, without repeats, empty where not to be followed.

    `cut` says that the page was longer than `MAX_HTML_CHARS` and only its beginning was read.
    """

    title: str
    text: str
    links: tuple[httpx.URL, ...] = ()
    cut: bool = False


def read_page(page: Fetched) -> PageContent:
    """Title, text and links of a fetched page.

    Raises:
        FetchFailedError: `CONTENT`, the page has no content type and does not look like HTML.
    """
    if page.content_type in PLAIN_TYPES:
        text = decode_text(page.body, page.charset, html=False)
        return PageContent(_name_from(page.url), _tidy(text[:MAX_HTML_CHARS]), cut=len(text) > MAX_HTML_CHARS)
    if not page.content_type and not _LOOKS_LIKE_HTML.match(page.body[:1024]):
        raise FetchFailedError(SkipCode.CONTENT, "it has no content type and does not look like HTML")
    markup = decode_text(page.body, page.charset, html=True)
    tree = _parse(markup[:MAX_HTML_CHARS])
    cut = len(markup) > MAX_HTML_CHARS
    if tree is None:
        return PageContent(_name_from(page.url), "", cut=cut)
    follow = not _forbids_following(tree, page.robots_tag)
    links = _links(tree, page.url) if follow else ()
    title = _tidy(extract_title(tree) or "") or _name_from(page.url)
    return PageContent(title[:MAX_TITLE_CHARS], _readable_text(tree), links, cut)


def _parse(markup: str) -> html.HtmlElement | None:
    try:
        # As bytes: lxml refuses text that carries an XML encoding declaration of its own.
        return html.document_fromstring(markup.encode(), parser=html.HTMLParser(encoding="utf-8"))
    except (etree.LxmlError, ValueError):
        return None


def _readable_text(tree: html.HtmlElement) -> str:
    text = trafilatura.extract(tree, output_format="txt", include_comments=False)
    # trafilatura gives up on pages with very little text; whatever they say is still what the page says.
    return _tidy(text or trafilatura.html2txt(tree))


def _links(tree: html.HtmlElement, page_url: httpx.URL) -> tuple[httpx.URL, ...]:
    base = page_url
    for element in tree.iter("base"):
        if href := element.get("href"):
            base = resolve_link(page_url, href) or page_url
            break
    found: dict[httpx.URL, None] = {}
    for anchor in tree.iter("a", "area"):
        href = anchor.get("href")
        if href is None or "nofollow" in (anchor.get("rel") or "").lower().split():
            continue
        link = resolve_link(base, href)
        if link is not None:
            found[link] = None
            if len(found) == MAX_LINKS:
                break
    return tuple(found)


def _forbids_following(tree: html.HtmlElement, robots_tag: str) -> bool:
    directives = set(re.split(r"[,\s:]+", robots_tag))
    for meta in tree.iter("meta"):
        if (meta.get("name") or "").lower() == "robots":
            directives.update(re.split(r"[,\s]+", (meta.get("content") or "").lower()))
    return bool(directives & {"nofollow", "none"})


def _tidy(text: str) -> str:
    return _CONTROL.sub("", text).strip()


def _name_from(url: httpx.URL) -> str:
    return (url.path.rstrip("/").rpartition("/")[2] or url.host)[:MAX_TITLE_CHARS]
