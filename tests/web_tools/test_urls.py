"""One spelling for each URL."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.models import SkipCode
from toolfleet.services.web_tools.urls import origin_of, parse_web_url, resolve_link, site_of


@pytest.mark.parametrize(
    ("written", "one_spelling"),
    [
        ("http://Example.ORG", "http://example.org/"),
        ("http://example.org?a=1", "http://example.org/?a=1"),
        ("http://example.org/a%2Fb%3Fc?d=%26e", "http://example.org/a%2Fb%3Fc?d=%26e"),
        ("HTTP://example.org:80/a#part", "http://example.org/a"),
        ("https://example.org:443/a?b=1#c", "https://example.org/a?b=1"),
        ("http://example.org/a/../b/./c", "http://example.org/b/c"),
        ("  http://example.org/a\n", "http://example.org/a"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
    ],
)
def test_spellings_of_one_url_become_one(written: str, one_spelling: str) -> None:
    assert str(parse_web_url(written)) == one_spelling


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "empty"),
        ("example.org", "not an http or https URL"),
        ("ftp://example.org/", "not an http or https URL"),
        ("file:///etc/passwd", "not an http or https URL"),
        ("javascript:alert(1)", "not an http or https URL"),
        ("http:///path", "names no host"),
        ("http://", "names no host"),
        ("http://[::1", "not a valid URL"),
        ("http://example.org:99999/", "port 99999 is out of range"),
        ("http://example.org:port/", "not a valid URL"),
        ("http://user:secret@example.org/", "credentials"),
        ("http://user@example.org/", "credentials"),
        ("http://example.org:0/", "port 0 is out of range"),
        ("http://[not-an-address]/", "not a valid"),
        ("http://%5bbad/", "not a valid host name"),
        ("http://a..b/", "not a valid"),
        ("http://xn--a/", "not a valid"),
        ("http://example.org/" + "a" * 2048, "at most 2048"),
    ],
)
def test_what_cannot_be_fetched_is_refused_with_the_reason(written: str, reason: str) -> None:
    with pytest.raises(FetchFailedError, match=reason) as caught:
        parse_web_url(written)
    assert caught.value.code is SkipCode.BAD_URL


def test_a_refusal_does_not_repeat_a_password() -> None:
    with pytest.raises(FetchFailedError) as caught:
        parse_web_url("http://user:secret@example.org/")
    assert "secret" not in caught.value.reason


@given(st.text(max_size=60) | st.text(max_size=60).map("http://".__add__))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    try:
        url = parse_web_url(text)
    except FetchFailedError:
        return
    assert url.scheme in {"http", "https"}
    assert url.host
    assert parse_web_url(str(url)) == url


@pytest.mark.parametrize(
    ("href", "target"),
    [
        ("next", "http://example.org/a/next"),
        ("/top#part", "http://example.org/top"),
        ("//other.example/x", "http://other.example/x"),
        ("?page=2", "http://example.org/a/b?page=2"),
        (" ne\nxt ", "http://example.org/a/next"),
        ("#part", None),
        ("", None),
        ("mailto:a@example.org", None),
        ("data:text/html,hi", None),
        ("http://user@example.org/", None),
        ("http://[bad", None),
    ],
)
def test_links_become_absolute_or_nothing(href: str, target: str | None) -> None:
    found = resolve_link(httpx.URL("http://example.org/a/b"), href)
    assert (None if found is None else str(found)) == target


def test_http_and_https_on_their_default_ports_are_one_site() -> None:
    assert site_of(httpx.URL("http://example.org/")) == site_of(httpx.URL("https://example.org/x"))
    assert site_of(httpx.URL("http://example.org/")) != site_of(httpx.URL("http://example.org:8080/"))
    assert site_of(httpx.URL("http://example.org/")) != site_of(httpx.URL("http://www.example.org/"))


def test_an_origin_has_its_port_where_it_is_not_the_default() -> None:
    assert origin_of(httpx.URL("https://example.org:8443/x")) == "https://example.org:8443"
    assert origin_of(httpx.URL("http://[::1]:81/x")) == "http://[::1]:81"
