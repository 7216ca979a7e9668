"""`python -m toolfleet.services.web_tools` as an operator and a desktop client start it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from mcp import Client, StdioServerParameters
from mcp.shared.exceptions import MCPError

from tests.support.waiting import wait_until
from tests.web_tools.site import Site, html

MODULE = "toolfleet.services.web_tools"
MODES = pytest.mark.parametrize("mode", ["auto", "legacy"])


class Process:
    def __init__(self, process: asyncio.subprocess.Process, url: str, ready_file: Path) -> None:
        self.process = process
        self.url = url
        self.ready_file = ready_file

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 30)

    async def errors(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


async def start(*options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", MODULE, *options, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )


@asynccontextmanager
async def http_server(tmp_path: Path, *options: str) -> AsyncIterator[Process]:
    ready_file = tmp_path / "ready"
    process = await start("--port", "0", "--ready-file", str(ready_file), *options)
    try:
        await wait_until(
            lambda: ready_file.exists() or process.returncode is not None, "the server listens", timeout=30
        )
        yield Process(process, ready_file.read_text().strip(), ready_file)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_sigterm_ends_it_with_exit_code_0_and_in_silence(tmp_path: Path, site: Site) -> None:
    site.answers["/"] = html("Home")
    async with http_server(tmp_path, "--allow-private") as server:
        async with Client(server.url, mode="legacy") as client, httpx.AsyncClient(trust_env=False) as http:
            assert not (await client.call_tool("web_crawl", {"url": site.url()})).is_error
            assert (await http.get(server.url.replace("/mcp", "/health"))).status_code == 200
            server.process.send_signal(signal.SIGTERM)
            # With the session's event stream still open.
            assert await server.exit_code() == 0
        assert not server.ready_file.exists()
        assert "Traceback" not in (errors := await server.errors())
        assert "GET /" not in errors


@MODES
async def test_a_running_crawl_may_end_before_the_process_does(tmp_path: Path, site: Site, mode: str) -> None:
    async with http_server(tmp_path, "--allow-private") as server, Client(server.url, mode=mode) as client:
        site.answers |= {"/": html("Home", "/slow"), "/slow": site.hold}
        # The client checks a result against the tool's schema, and would ask for that once the server is gone.
        await client.list_tools()
        call = asyncio.create_task(client.call_tool("web_crawl", {"url": site.url()}))
        await asyncio.wait_for(site.held.wait(), 10)
        server.process.send_signal(signal.SIGTERM)
        async with httpx.AsyncClient(trust_env=False) as http:
            health = server.url.replace("/mcp", "/health")

            async def drains() -> bool:
                return (await http.get(health)).status_code == 503

            await wait_until(drains, "the server drains")
        site.release.set()
        assert not (await call).is_error
        assert await server.exit_code() == 0


async def test_a_second_signal_does_not_wait_for_the_crawl(tmp_path: Path, site: Site) -> None:
    site.answers["/"] = site.hold
    async with http_server(tmp_path, "--allow-private") as server, Client(server.url) as client:
        call = asyncio.create_task(client.call_tool("web_crawl", {"url": site.url()}))
        await asyncio.wait_for(site.held.wait(), 10)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        await asyncio.wait_for(site.abandoned.wait(), 20)
        assert await server.exit_code() == 0
        with pytest.raises(MCPError):
            await call


async def test_private_addresses_need_the_flag(tmp_path: Path, site: Site) -> None:
    async with http_server(tmp_path) as server, Client(server.url) as client:
        assert (await client.call_tool("web_crawl", {"url": site.url()})).is_error
    assert site.paths == []


async def test_a_taken_port_ends_it_with_exit_code_1_and_the_reason() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await start("--port", str(taken.getsockname()[1]))
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"cannot listen on 127.0.0.1" in errors
    assert b"Traceback" not in errors


async def test_a_setting_that_does_not_parse_ends_it_with_exit_code_2() -> None:
    process = await start("--port", "70000")
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"web_port" in errors


def stdio(*options: str) -> StdioServerParameters:
    return StdioServerParameters(command=sys.executable, args=["-m", MODULE, "--stdio", *options], env=dict(os.environ))


@MODES
async def test_stdio_serves_the_same_tool_with_progress(site: Site, mode: str) -> None:
    site.answers |= {"/": html("Home", "/a"), "/a": html("Second")}
    told: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append(progress)

    async with Client(stdio("--allow-private"), mode=mode) as client:
        result = await client.call_tool("web_crawl", {"url": site.url()}, progress_callback=note)
        await wait_until(lambda: told == [0, 1, 2], "all progress has arrived")
    assert result.structured_content is not None
    assert result.structured_content["totals"]["pages"] == 2


@MODES
async def test_a_cancelled_call_stops_the_crawl_over_stdio(site: Site, mode: str) -> None:
    site.answers["/"] = site.hold
    async with Client(stdio("--allow-private"), mode=mode) as client:
        call = asyncio.create_task(client.call_tool("web_crawl", {"url": site.url()}))
        await asyncio.wait_for(site.held.wait(), 30)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(site.abandoned.wait(), 10)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_stdio_server_with_exit_code_0(signum: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", MODULE, "--stdio", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(
        b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},'
        b'"clientInfo":{"name":"test","version":"1"}}}\n'
    )
    assert b'"serverInfo"' in await asyncio.wait_for(process.stdout.readline(), 30)
    process.send_signal(signum)
    assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_the_end_of_stdin_ends_a_stdio_server() -> None:
    process = await start("--stdio")
    assert await asyncio.wait_for(process.wait(), 30) == 0
