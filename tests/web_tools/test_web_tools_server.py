"""The tool through MCP: real HTTP, clients of the modern protocol and of the handshake ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import httpx
import jsonschema
import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp.types import CallToolResult, TextContent

from tests.support.waiting import wait_until
from tests.web_tools.site import Site, html
from toolfleet.services.web_tools.models import CrawlResult
from toolfleet.services.web_tools.server import RunningWebTools, serve_web_tools
from toolfleet.settings import Settings

MODES = pytest.mark.parametrize("mode", ["auto", "legacy"])


@pytest.fixture
async def server(web_settings: Callable[..., Settings]) -> AsyncIterator[RunningWebTools]:
    async with serve_web_tools(web_settings()) as running:
        yield running


def text_of(result: CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


@MODES
async def test_the_protocol_is_the_one_that_the_client_speaks(server: RunningWebTools, mode: str) -> None:
    async with Client(server.url, mode=mode) as client:
        assert (client.protocol_version == "2026-07-28") is (mode == "auto")


@MODES
async def test_the_tool_is_described_for_who_calls_it(server: RunningWebTools, mode: str) -> None:
    async with Client(server.url, mode=mode) as client:
        (tool,) = (await client.list_tools()).tools
    assert tool.name == "web_crawl"
    assert tool.annotations is not None
    assert (tool.annotations.read_only_hint, tool.annotations.idempotent_hint) == (True, True)
    assert tool.annotations.open_world_hint is True
    assert tool.output_schema is not None
    assert tool.input_schema["required"] == ["url"]
    arguments = jsonschema.Draft202012Validator(tool.input_schema)
    assert arguments.is_valid({"url": "https://example.org", "max_pages": 100, "max_depth": 0, "same_host": False})
    for wrong in ({}, {"url": "example.org"}, {"url": "ftp://a/"}, {"url": "http://a/", "max_page": 3}):
        assert not arguments.is_valid(wrong)
    for name, number in (("max_pages", 0), ("max_pages", 101), ("max_depth", -1), ("max_depth", 11)):
        assert not arguments.is_valid({"url": "http://a/", name: number})


@MODES
async def test_a_crawl_gives_structured_and_readable_content(server: RunningWebTools, site: Site, mode: str) -> None:
    site.answers |= {"/": html("Home", "/a"), "/a": html("Second")}
    async with Client(server.url, mode=mode) as client:
        result = await client.call_tool("web_crawl", {"url": site.url()})
    assert not result.is_error
    crawled = CrawlResult.model_validate(result.structured_content)
    assert [page.title for page in crawled.pages] == ["Home", "Second"]
    assert "## Second" in text_of(result)


@MODES
async def test_progress_comes_page_by_page(server: RunningWebTools, site: Site, mode: str) -> None:
    site.answers |= {"/": html("Home", "/a"), "/a": html("Second")}
    told: list[tuple[float, float | None, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    async with Client(server.url, mode=mode) as client:
        await client.call_tool("web_crawl", {"url": site.url(), "max_depth": 1}, progress_callback=note)
        # Notifications may still be on their way when the result is there.
        await wait_until(lambda: len(told) == 3, "all progress has arrived")
    assert told == [
        (0, 10, f"fetching {site.url()}"),
        (1, 2, f"read {site.url()}"),
        (2, 2, f"read {site.url('/a')}"),
    ]


@MODES
async def test_a_cancelled_call_stops_the_crawl(server: RunningWebTools, site: Site, mode: str) -> None:
    site.answers |= {"/": html("Home", "/slow", "/next"), "/slow": site.hold, "/next": site.hold}
    async with Client(server.url, mode=mode) as client:
        call = asyncio.create_task(client.call_tool("web_crawl", {"url": site.url()}))
        await asyncio.wait_for(site.held.wait(), 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(site.abandoned.wait(), 10)
        await wait_until(lambda: server.tool.active == 0, "the server has no crawl left")


@MODES
async def test_a_call_that_times_out_stops_the_crawl(server: RunningWebTools, site: Site, mode: str) -> None:
    site.answers |= {"/": site.hold}
    async with Client(server.url, mode=mode) as client:
        with pytest.raises(MCPError, match=r"(?i)timed out"):
            await client.call_tool("web_crawl", {"url": site.url()}, read_timeout_seconds=1)
        await asyncio.wait_for(site.abandoned.wait(), 10)
        await wait_until(lambda: server.tool.active == 0, "the server has no crawl left")


async def test_a_client_that_vanishes_stops_its_crawl(server: RunningWebTools, site: Site) -> None:
    site.answers["/"] = site.hold
    async with Client(server.url) as client:
        call = asyncio.create_task(client.call_tool("web_crawl", {"url": site.url()}))
        await asyncio.wait_for(site.held.wait(), 10)
    with pytest.raises((MCPError, asyncio.CancelledError)):
        await call
    await asyncio.wait_for(site.abandoned.wait(), 10)


@MODES
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"url": "example.org"}, "not an http or https URL"),
        ({"url": "http://user:secret@example.org/"}, "credentials"),
        ({"url": "http://example.org/", "max_pages": 0}, "greater than or equal to 1"),
        ({"url": "http://example.org/", "max_page": 5}, "max_page"),
        ({}, "url"),
    ],
)
async def test_wrong_arguments_are_an_error_result_with_the_reason(
    server: RunningWebTools, mode: str, arguments: dict[str, object], reason: str
) -> None:
    async with Client(server.url, mode=mode) as client:
        result = await client.call_tool("web_crawl", arguments)
    assert result.is_error
    assert reason in text_of(result)


@MODES
async def test_a_start_page_that_cannot_be_read_is_an_error_result(
    server: RunningWebTools, site: Site, mode: str
) -> None:
    async with Client(server.url, mode=mode) as client:
        result = await client.call_tool("web_crawl", {"url": site.url("/missing")})
    assert result.is_error
    assert f"{site.url('/missing')} could not be read: it answered HTTP 404 Not Found" in text_of(result)


async def test_private_addresses_are_refused_by_default(web_settings: Callable[..., Settings], site: Site) -> None:
    async with serve_web_tools(web_settings(web_allow_private=False)) as server, Client(server.url) as client:
        result = await client.call_tool("web_crawl", {"url": site.url()})
    assert result.is_error
    assert "a loopback address" in text_of(result)
    assert site.paths == []


async def test_health_counts_crawls_and_says_when_it_drains(server: RunningWebTools, site: Site) -> None:
    site.answers["/"] = html("Home")
    async with Client(server.url) as client, httpx.AsyncClient(trust_env=False) as http:
        await client.call_tool("web_crawl", {"url": site.url()})
        fine = await http.get(server.health_url)
        await server.drain()
        draining = await http.get(server.health_url)
        with pytest.raises(MCPError, match="shutting down"):
            await client.call_tool("web_crawl", {"url": site.url()})
    assert (fine.status_code, fine.json()["status"]) == (200, "ok")
    assert fine.json()["crawls"] == {"active": 0, "finished": 1}
    assert (draining.status_code, draining.json()["status"]) == (503, "draining")


async def test_a_taken_port_is_told_with_its_address(
    server: RunningWebTools, web_settings: Callable[..., Settings]
) -> None:
    port = int(server.health_url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        async with serve_web_tools(web_settings(web_port=port)):
            pass
