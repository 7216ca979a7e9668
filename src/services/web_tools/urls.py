"""One spelling for each URL, and which URLs belong to the same site.

Everything here and in the fetcher parses with `httpx.URL`, the parser that also builds the request: two parsers that
read one URL differently are how address checks are walked around.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address

import httpx

from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.models import MAX_URL_CHARS, SkipCode

_DEFAULT_PORTS = {"http": 80, "https": 443}
# The URL standard drops tabs and newlines anywhere in a URL and trims C0 controls and spaces at its ends.
_DROPPED = re.compile(r"[\t\n\r]")
_TRIMMED = "".join(map(chr, range(0x21)))
_IS_WEB = re.compile(r"https?:", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?")
_HAS_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)

SiteKey = tuple[str, int]


def parse_web_url(text: str) -> httpx.URL:
    """Parse an absolute http or https URL and bring it to its one spelling.

    Lower-case scheme and host, no default port, no dot segments, `/` for an empty path, no fragment.

    Raises:
        FetchFailedError: `BAD_URL`, with the reason, for anything else, credentials in the URL included.
    """
    cleaned = _DROPPED.sub("", text.strip(_TRIMMED))
    if not cleaned:
        raise _bad("the URL is empty; give one like https://example.org/")
    if len(cleaned) > MAX_URL_CHARS:
        raise _bad(f"the URL has {len(cleaned)} characters; at most {MAX_URL_CHARS} are accepted")
    if not _IS_WEB.match(cleaned):
        raise _bad(f"{cleaned[:80]!r} is not an http or https URL; give one like https://example.org/")
    try:
        url = httpx.URL(cleaned)
        host, port = url.host, url.port
    except (httpx.InvalidURL, ValueError) as error:
        raise _bad(f"{cleaned[:80]!r} is not a valid URL: {error}") from error
    if url.scheme not in _DEFAULT_PORTS or not host:
        raise _bad(f"{cleaned[:80]!r} names no host; give a URL like https://example.org/")
    if url.userinfo or "@" in url.netloc.decode("ascii", "replace"):
        raise _bad("the URL carries a user name or password; web_crawl sends no credentials, remove them")
    if port is not None and not 0 < port < 65536:
        raise _bad(f"port {port} is out of range; ports go from 1 to 65535")
    if not _is_host(url.raw_host.decode("ascii")):
        raise _bad(f"{host[:80]!r} is not a valid host name")
    # With the path written out: `http://example.org` and `http://example.org/` are one page but unequal to httpx.
    return url.copy_with(raw_path=url.raw_path, fragment=None)


def resolve_link(base: httpx.URL, href: str) -> httpx.URL | None:
    """The absolute URL that a link on a page means, or None where it leads to no web page (`mailto:`, malformed)."""
    cleaned = _DROPPED.sub("", href.strip(_TRIMMED))
    if not cleaned or cleaned.startswith("#") or len(cleaned) > MAX_URL_CHARS:
        return None
    if _HAS_SCHEME.match(cleaned) and not _IS_WEB.match(cleaned):
        return None
    try:
        return parse_web_url(str(base.join(cleaned)))
    except (FetchFailedError, httpx.InvalidURL, ValueError):
        return None


def site_of(url: httpx.URL) -> SiteKey:
    """Host and port. http and https on their default ports count as one site, since sites move between the two."""
    port = url.port or _DEFAULT_PORTS[url.scheme]
    return url.host.rstrip("."), 443 if port == _DEFAULT_PORTS["http"] else port


def origin_of(url: httpx.URL) -> str:
    """Scheme, host and port, as `https://example.org:8443`: the reach of one robots.txt (RFC 9309, section 2.3)."""
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _is_host(host: str) -> bool:
    if ":" not in host:
        # After IDNA only these are left; httpx would carry anything else on, percent-encoded, into the lookup.
        return _HOST.fullmatch(host) is not None
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True


def _bad(reason: str) -> FetchFailedError:
    return FetchFailedError(SkipCode.BAD_URL, reason)
