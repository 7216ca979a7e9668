"""A real HTTP server on loopback whose pages a test sets, and which remembers who came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from toolfleet.services.web_tools.http_host import host_app

Handler = Callable[[Request], Awaitable[Response]]
Answer = str | Response | Handler

PROSE = (
    "The lighthouse keeper wrote a line into the log every evening, whatever the weather was, and read it aloud to "
    "the empty room. Nobody had asked for it, and still the habit outlived three keepers and two lamps. "
)


def html(title: str, *links: str, text: str = PROSE * 3, head: str = "") -> str:
    """A page with a title, enough prose to be extracted, and links to the given hrefs."""
    anchors = "".join(f'<p><a href="{href}">{href}</a></p>' for href in links)
    return (
        f"<!doctype html><html><head><title>{title}</title>{head}</head><body><article><h1>{title}</h1>"
        f"<p>{text}</p></article>{anchors}</body></html>"
    )


def redirect(target: str) -> Response:
    return RedirectResponse(target, status_code=302)


class Site:
    """What a test sees of its server: `base_url`, the paths asked for in order, and the `Host` headers sent."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.answers = dict(answers)
        self.base_url = ""
        self.paths: list[str] = []
        self.hosts: list[str] = []
        self.held = asyncio.Event()
        """A request waits in `hold`."""
        self.abandoned = asyncio.Event()
        """The client of a request in `hold` closed its connection."""
        self.release = asyncio.Event()
        """Set by a test to let `hold` answer after all."""

    def url(self, path: str = "/") -> str:
        return self.base_url + path

    @property
    def port(self) -> int:
        return int(self.base_url.rpartition(":")[2])

    async def hold(self, request: Request) -> Response:
        """A page that comes when the test releases it, or never."""
        self.held.set()
        gone = asyncio.create_task(self._gone(request))
        released = asyncio.create_task(self.release.wait())
        await asyncio.wait({gone, released}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        released.cancel()
        return HTMLResponse(html("Held"))

    async def _gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.abandoned.set()

    async def answer(self, request: Request) -> Response:
        path = request.url.path
        self.paths.append(path)
        self.hosts.append(request.headers["host"])
        match self.answers.get(path):
            case None:
                return PlainTextResponse("no such page", status_code=404)
            case str() as page:
                return HTMLResponse(page)
            case Response() as response:
                return response
            case handler:
                return await handler(request)


@asynccontextmanager
async def serve_site(
    answers: Mapping[str, Answer] | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Site]:
    """Serve a site meanwhile. Without an answer for it, `/robots.txt` is a 404, which allows everything."""
    site = Site(answers or {})
    app = Starlette(routes=[Route("/{path:path}", site.answer)])
    async with host_app(app, host, port) as hosted:
        site.base_url = hosted.base_url
        yield site
