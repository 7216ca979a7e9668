"""From the bytes of a page to its title, text and links."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.web_tools.site import PROSE, html
from toolfleet.services.web_tools.charsets import decode_text
from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.fetcher import Fetched
from toolfleet.services.web_tools.page_reader import MAX_HTML_CHARS, MAX_LINKS, MAX_TITLE_CHARS, PageContent, read_page


def read(
    body: str | bytes, content_type: str = "text/html", *, charset: str | None = None, robots_tag: str = ""
) -> PageContent:
    data = body.encode() if isinstance(body, str) else body
    url = httpx.URL("http://example.org/dir/page.html")
    return read_page(Fetched(url, 200, content_type, charset, robots_tag, data, 1))


def links(body: str, **options: str) -> list[str]:
    return [str(link) for link in read(body, **options).links]


def test_title_and_text_without_the_navigation() -> None:
    page = html("The lighthouse").replace("<article>", "<nav><a href='/'>Home sweet home</a></nav><article>")
    content = read(page)
    assert content.title == "The lighthouse"
    assert PROSE.strip()[:60] in content.text
    assert "Home sweet home" not in content.text
    assert not content.cut


def test_a_page_with_very_little_text_still_says_it() -> None:
    assert "Back soon" in read("<html><body><p>Back soon</p></body></html>").text


def test_a_page_without_a_title_is_called_by_its_url() -> None:
    assert read("<html><body><p>Back soon</p></body></html>").title == "page.html"


@pytest.mark.parametrize("body", ["", "   ", "<!-- -->"])
def test_an_empty_page_is_an_empty_page(body: str) -> None:
    assert read(body) == PageContent("page.html", "")


def test_links_are_absolute_and_told_once_in_page_order() -> None:
    page = html("Links", "b", "/a#x", "/a#y", "mailto:x@example.org", "//other.example/", "#top")
    assert links(page) == ["http://example.org/dir/b", "http://example.org/a", "http://other.example/"]


def test_the_base_element_is_honoured() -> None:
    assert links(html("Based", "b", head='<base href="/elsewhere/">')) == ["http://example.org/elsewhere/b"]


def test_nofollow_is_honoured_on_links_pages_and_headers() -> None:
    assert links('<html><body><a rel="noopener NoFollow" href="/a">a</a><a href="/b">b</a></body></html>') == [
        "http://example.org/b"
    ]
    assert links(html("Meta", "/a", head='<meta name="ROBOTS" content="noindex, nofollow">')) == []
    assert links(html("Meta", "/a", head='<meta name="robots" content="noindex">')) == ["http://example.org/a"]
    assert links(html("Header", "/a"), robots_tag="none") == []


def test_links_and_titles_are_bounded() -> None:
    content = read(html("T" * 1000, *(f"/{number}" for number in range(MAX_LINKS + 5))))
    assert len(content.links) == MAX_LINKS
    assert len(content.title) == MAX_TITLE_CHARS


def test_a_very_long_page_is_read_in_part_and_says_so() -> None:
    assert read("<html><body><p>" + "word " * (MAX_HTML_CHARS // 5 + 10)).cut


def test_plain_text_is_taken_as_it_is_without_control_characters() -> None:
    assert read("one\x00\x1b two\n<b>three</b>", "text/plain").text == "one two\n<b>three</b>"


def test_xhtml_with_an_encoding_declaration_is_read() -> None:
    assert (
        read('<?xml version="1.0" encoding="utf-8"?>' + html("Declared"), "application/xhtml+xml").title == "Declared"
    )


def test_a_page_without_a_type_is_read_only_if_it_looks_like_html() -> None:
    assert read(html("Untyped"), "").title == "Untyped"
    with pytest.raises(FetchFailedError, match="no content type"):
        read(b"\x89PNG\r\n", "")


@given(st.binary(max_size=300))
def test_any_bytes_are_readable(body: bytes) -> None:
    read(body)


@pytest.mark.parametrize(
    ("body", "header", "text"),
    [
        ("grüße".encode(), None, "grüße"),
        ("grüße".encode("cp1252"), None, "grüße"),
        ("grüße".encode("cp1252"), "iso-8859-1", "grüße"),
        ("\ufeffgrüße".encode(), "latin-1", "grüße"),
        (b"\xff\xfe" + "grüße".encode("utf-16-le"), None, "grüße"),
        ("привет".encode("koi8-r"), "koi8-r", "привет"),
        ("こんにちは".encode("shift_jis"), "Shift_JIS", "こんにちは"),
        (b'<meta charset="windows-1251">' + "привет".encode("cp1251"), None, '<meta charset="windows-1251">привет'),
        (b'<meta content="text/html; charset=euc-jp">', None, '<meta content="text/html; charset=euc-jp">'),
        ('<meta charset="utf-16">grüße'.encode(), None, '<meta charset="utf-16">grüße'),
        ("grüße".encode(), "no-such-charset", "grüße"),
        ("grüße".encode(), "idna", "grüße"),
        ("grüße".encode(), "hex", "grüße"),
        (b"a\xffb", "utf-8", "a\ufffdb"),
    ],
)
def test_text_is_decoded_as_browsers_do(body: bytes, header: str | None, text: str) -> None:
    assert decode_text(body, header, html=True) == text
