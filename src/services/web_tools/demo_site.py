"""A small site of linked articles on loopback: what the demo crawls, so that it needs no internet.

Four sections with an index and eight articles each, whose pages link only within their section (a crawl of each finds
pages that the others do not), a home page over them, a section that robots.txt closes, and a redirect. The text is
put together from a seed: the same on every run, different on every page, and long enough for a reader's extraction.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from html import escape

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from toolfleet.services.web_tools.http_host import host_app

ARTICLES_PER_SECTION = 8
_PARAGRAPHS = 5
_SENTENCES = 5


@dataclass(frozen=True, slots=True)
class DemoSection:
    """One part of the site: its path, its title, and the words that its sentences are made of."""

    path: str
    title: str
    subjects: tuple[str, ...]
    actions: tuple[str, ...]
    settings: tuple[str, ...]

    def url(self, base_url: str) -> str:
        """The URL at which a crawl of this section starts."""
        return base_url + self.path


DEMO_SECTIONS = (
    DemoSection(
        "/harbours/",
        "Harbours and tides",
        ("the harbour master", "a coastal pilot", "the morning ferry", "an old breakwater", "the tide gauge"),
        ("records the height of every tide", "waits for slack water", "reads the swell", "marks the safe channel"),
        ("before the fog lifts", "along the northern quay", "when the wind turns west", "in the spring tides"),
    ),
    DemoSection(
        "/orchards/",
        "Orchards and seasons",
        ("the head gardener", "an early apple", "the grafted pear", "a row of quinces", "the beekeeper"),
        ("waits for the last frost", "carries more fruit each year", "is pruned to an open cup", "feeds the pickers"),
        ("on the southern slope", "after a dry summer", "by the stone wall", "in the first week of May"),
    ),
    DemoSection(
        "/railways/",
        "Railways and signals",
        ("the signal box", "a branch-line guard", "the night express", "the track inspector", "an express engine"),
        ("holds the line until it is clear", "answers with two bells", "slows for the curve", "keeps its timetable"),
        ("beyond the viaduct", "at the junction", "in heavy snow", "where the valley narrows"),
    ),
    DemoSection(
        "/observatories/",
        "Observatories and skies",
        ("the night assistant", "a variable star", "the meridian telescope", "the dome shutter", "a faint comet"),
        ("is measured three times", "drifts across the field", "needs an hour to cool", "appears on the plate"),
        ("on moonless nights", "near the horizon", "above the cloud line", "late in the observing season"),
    ),
)
"""The four sections, in the order of the home page; `section.url(base_url)` is where a crawl of one starts."""

CLOSED_PATH = "/archive/"
"""Linked from every section's index, and closed by robots.txt."""
_TOPICS = ("beginnings", "instruments", "a working day", "weather", "mistakes", "people", "repairs", "records")


@asynccontextmanager
async def serve_demo_site(host: str = "127.0.0.1", port: int = 0, latency_s: float = 0.03) -> AsyncIterator[str]:
    """Serve the site while the context is open, and give its base URL, without a trailing slash.

    Args:
        host: the address to listen on.
        port: 0 takes a free one.
        latency_s: seconds before each answer, so that progress can be watched.

    Raises:
        OSError: the address cannot be bound.
    """
    async with host_app(_app(demo_pages(), latency_s), host, port) as hosted:
        yield hosted.base_url


def demo_pages(seed: int = 7) -> dict[str, str]:
    """Every page of the site, path to HTML, the closed section included; the same for the same seed."""
    # Text of a demonstration, not a secret: it has to be repeatable.
    rng = random.Random(seed)  # noqa: S311
    links = [(section.path, section.title) for section in DEMO_SECTIONS]
    pages = {"/": _page("The toolfleet demo site", ["Four small collections of invented articles."], links)}
    for section in DEMO_SECTIONS:
        articles = [(f"{section.path}{number}", _headline(section, number)) for number in range(ARTICLES_PER_SECTION)]
        extra = [(f"{section.path}latest", "The latest article"), (CLOSED_PATH, "The archive")]
        pages[section.path] = _page(section.title, _paragraphs(section, rng), articles + extra)
        for number, (path, headline) in enumerate(articles):
            following = articles[(number + 1) % len(articles)]
            pages[path] = _page(headline, _paragraphs(section, rng), [following, (section.path, section.title)])
    pages[CLOSED_PATH] = _page("The archive", ["Robots are asked to stay outside."], [])
    return pages


def _headline(section: DemoSection, number: int) -> str:
    return f"{section.title}: {_TOPICS[number]}"


def _paragraphs(section: DemoSection, rng: random.Random) -> list[str]:
    return [" ".join(_sentence(section, rng) for _ in range(_SENTENCES)) for _ in range(_PARAGRAPHS)]


def _sentence(section: DemoSection, rng: random.Random) -> str:
    subject, other = rng.sample(section.subjects, 2)
    first, second = rng.sample(section.actions, 2)
    place = rng.choice(section.settings)
    joint = rng.choice(("while", "because", "although", "and in time"))
    return f"{subject.capitalize()} {first} {place}, {joint} {other} {second}."


def _page(title: str, paragraphs: list[str], links: list[tuple[str, str]]) -> str:
    body = "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
    nav = "\n".join(f'<li><a href="{escape(path)}">{escape(text)}</a></li>' for path, text in links)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>\n'
        f"<body><main><article><h1>{escape(title)}</h1>\n{body}\n</article></main>\n<nav><ul>\n{nav}\n</ul></nav>"
        "</body></html>\n"
    )


def _app(pages: Mapping[str, str], latency_s: float) -> Starlette:
    async def robots(_: Request) -> Response:
        return PlainTextResponse(f"User-agent: *\nDisallow: {CLOSED_PATH}\n")

    async def page(request: Request) -> Response:
        await asyncio.sleep(latency_s)
        path = request.url.path
        if path.endswith("/latest"):
            return RedirectResponse(f"{path.removesuffix('latest')}{ARTICLES_PER_SECTION - 1}", status_code=302)
        if path not in pages:
            return HTMLResponse(_page("Not found", ["There is no such page."], []), status_code=404)
        return HTMLResponse(pages[path])

    return Starlette(routes=[Route("/robots.txt", robots), Route("/{path:path}", page)])
