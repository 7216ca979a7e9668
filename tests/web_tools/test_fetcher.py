"""One GET and its redirects, against a real server that misbehaves in every way we know."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Sequence

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tests.web_tools.site import Site, html, redirect, serve_site
from toolfleet.services.web_tools.address_guard import AddressGuard, Resolver, system_resolver
from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.fetcher import MAX_REDIRECTS, Fetched, Fetcher, Wanted, open_client
from toolfleet.services.web_tools.models import SkipCode
from toolfleet.services.web_tools.page_reader import READABLE_TYPES
from toolfleet.services.web_tools.pinned_transport import PinnedTransport
from toolfleet.services.web_tools.urls import parse_web_url

PAGE = Wanted(10_000, content_types=READABLE_TYPES)


async def admit_all(_: httpx.URL) -> None: ...


async def fetch(
    url: str,
    wanted: Wanted = PAGE,
    *,
    timeout: float = 10,
    allow_private: bool = True,
    resolver: Resolver = system_resolver,
    admit: Callable[[httpx.URL], object] | None = None,
) -> Fetched:
    guard = AddressGuard(allow_private=allow_private, resolver=resolver)
    transport = PinnedTransport(guard, ssl_context=ssl.create_default_context(), max_connections=2)
    async with open_client(transport, "test-agent/1.0", timeout=timeout) as client:
        return await Fetcher(client, timeout=timeout).fetch(parse_web_url(url), wanted, admit or admit_all)  # type: ignore[arg-type]


async def failure(url: str, wanted: Wanted = PAGE, **options: object) -> FetchFailedError:
    with pytest.raises(FetchFailedError) as caught:
        await fetch(url, wanted, **options)  # type: ignore[arg-type]
    return caught.value


async def test_a_page_comes_with_its_type_charset_and_final_url(site: Site) -> None:
    site.answers |= {
        "/": redirect("/page#part"),
        "/page": Response(b"gr\xfc\xdfe", media_type="text/plain; charset=latin-1"),
    }
    fetched = await fetch(site.url())
    assert (str(fetched.url), fetched.status, fetched.body) == (site.url("/page"), 200, b"gr\xfc\xdfe")
    assert (fetched.content_type, fetched.charset) == ("text/plain", "latin-1")
    assert fetched.elapsed_ms >= 0


async def test_an_error_status_is_an_answer_without_a_body(site: Site) -> None:
    fetched = await fetch(site.url("/missing"))
    assert (fetched.status, fetched.ok, fetched.body) == (404, False, b"")


async def test_redirects_are_followed_up_to_the_limit(site: Site) -> None:
    site.answers |= {f"/{hop}": redirect(f"/{hop + 1}") for hop in range(MAX_REDIRECTS + 1)}
    site.answers[f"/{MAX_REDIRECTS + 1}"] = html("End")
    assert (await fetch(site.url("/1"))).ok
    failed = await failure(site.url("/0"))
    assert failed.code is SkipCode.REDIRECT
    assert f"more than {MAX_REDIRECTS} times" in failed.reason


async def test_a_redirect_loop_is_told(site: Site) -> None:
    site.answers |= {"/a": redirect("/b"), "/b": redirect("/a")}
    failed = await failure(site.url("/a"))
    assert failed.code is SkipCode.REDIRECT
    assert "loop" in failed.reason
    assert site.paths == ["/a", "/b"]


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("file:///etc/passwd", SkipCode.BAD_URL),
        ("ftp://example.org/", SkipCode.BAD_URL),
        ("http://user:secret@example.org/", SkipCode.BAD_URL),
        ("http://169.254.169.254/latest/meta-data/", SkipCode.ADDRESS_REFUSED),
        ("http://[::ffff:127.0.0.1]/", SkipCode.ADDRESS_REFUSED),
        ("http://2130706433/", SkipCode.ADDRESS_REFUSED),
    ],
)
async def test_a_redirect_is_checked_like_a_first_request(site: Site, target: str, code: SkipCode) -> None:
    site.answers["/"] = Response(status_code=302, headers={"location": target})
    assert (await failure(site.url())).code is code


async def test_a_redirect_without_a_target_is_told(site: Site) -> None:
    site.answers["/"] = Response(status_code=302)
    assert (await failure(site.url())).code is SkipCode.REDIRECT


async def test_a_private_address_behind_a_name_is_refused_before_any_connection(site: Site) -> None:
    async def resolver(_host: str, _port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    failed = await failure(f"http://innocent.test:{site.port}/", allow_private=False, resolver=resolver)
    assert failed.code is SkipCode.ADDRESS_REFUSED
    assert site.paths == []


async def test_every_hop_is_admitted_before_it_is_requested(site: Site) -> None:
    asked: list[str] = []

    async def admit(url: httpx.URL) -> None:
        asked.append(url.path)
        if url.path == "/closed":
            raise FetchFailedError(SkipCode.ROBOTS, "closed")

    site.answers |= {"/": redirect("/closed"), "/closed": html("Closed")}
    assert (await failure(site.url(), admit=admit)).code is SkipCode.ROBOTS
    assert (asked, site.paths) == (["/", "/closed"], ["/"])


async def test_a_type_that_is_not_text_is_refused_unread(site: Site) -> None:
    site.answers["/"] = Response(b"%PDF", media_type="application/pdf")
    failed = await failure(site.url())
    assert failed.code is SkipCode.CONTENT
    assert "application/pdf" in failed.reason


async def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not(site: Site) -> None:
    site.answers |= {"/fits": Response(b"x" * 10_000, media_type="text/plain")}
    site.answers |= {"/over": Response(b"x" * 10_001, media_type="text/plain")}
    assert len((await fetch(site.url("/fits"))).body) == 10_000
    assert (await failure(site.url("/over"))).code is SkipCode.TOO_LARGE


async def test_a_body_of_no_declared_length_is_cut_off(site: Site) -> None:
    async def long(_: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(1000):
                yield b"x" * 1000

        return StreamingResponse(chunks(), media_type="text/plain")

    site.answers["/"] = long
    assert (await failure(site.url())).code is SkipCode.TOO_LARGE
    assert len((await fetch(site.url(), Wanted(10_000, cut=True))).body) == 10_000


def packed(body: bytes, encoding: str) -> Response:
    return Response(body, media_type="text/plain", headers={"content-encoding": encoding})


async def test_a_compression_bomb_is_too_large(site: Site) -> None:
    site.answers["/"] = packed(gzip.compress(b"\0" * 50_000_000), "gzip")
    assert (await failure(site.url(), Wanted(1_000_000))).code is SkipCode.TOO_LARGE


async def test_gzip_and_deflate_are_unpacked(site: Site) -> None:
    site.answers |= {
        "/gzip": packed(gzip.compress(b"hello"), "gzip"),
        "/zlib": packed(zlib.compress(b"hello"), "deflate"),
    }
    assert (await fetch(site.url("/gzip"))).body == b"hello"
    assert (await fetch(site.url("/zlib"))).body == b"hello"


@pytest.mark.parametrize(("body", "encoding"), [(b"not gzip", "gzip"), (b"hello", "br"), (b"hello", "gzip, gzip")])
async def test_an_encoding_that_does_not_unpack_is_told(site: Site, body: bytes, encoding: str) -> None:
    site.answers["/"] = packed(body, encoding)
    assert (await failure(site.url())).code is SkipCode.CONTENT


async def test_an_answer_that_never_comes_is_a_time_out_and_its_connection_is_closed(site: Site) -> None:
    site.answers["/"] = site.hold
    failed = await failure(site.url(), timeout=0.1)
    assert failed.code is SkipCode.TIMEOUT
    assert "0.1 s" in failed.reason
    await asyncio.wait_for(site.abandoned.wait(), 10)


async def test_a_body_that_trickles_is_a_time_out_as_a_whole(site: Site) -> None:
    async def trickle(_: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)

        return StreamingResponse(chunks(), media_type="text/plain")

    site.answers["/"] = trickle
    assert (await failure(site.url(), timeout=0.1)).code is SkipCode.TIMEOUT


async def test_a_closed_port_is_a_failed_connection() -> None:
    async with serve_site() as closed:
        url = closed.url()
    assert (await failure(url)).code is SkipCode.CONNECTION


async def test_what_does_not_speak_http_is_a_failed_connection() -> None:
    async def noise(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00\x01 no http here\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(noise, "127.0.0.1", 0)
    async with server:
        failed = await failure(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    assert failed.code is SkipCode.CONNECTION
