"""MCP servers for the tests: the toolbox over stdio and HTTP, under the current protocol and an older one."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.conftest import SettingsFactory
from tests.support.waiting import wait_until
from tests.tool_execution.harness import (
    Caller,
    HttpToolbox,
    ListRegistry,
    Notes,
    own_children,
    peer,
    stdio_toolbox,
)
from toolfleet.services.background_jobs.redis_functions import RedisFunctions
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.catalogue_store import SharedStore
from toolfleet.services.tool_execution.mcp_runner import McpTools, mcp_tools

OpenTools = Callable[..., Awaitable[McpTools]]
StartHttp = Callable[..., Awaitable[HttpToolbox]]


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes.jsonl")


@pytest.fixture
async def no_process_left() -> AsyncIterator[None]:
    """Fails a test that leaves a child process behind."""
    before = set(own_children())
    yield
    await wait_until(lambda: not set(own_children()) - before, "no child process of the test is left")


@pytest.fixture
async def open_tools(make_settings: SettingsFactory, no_process_left: None) -> AsyncIterator[OpenTools]:
    """`await open_tools(server, …, redis=…, registry=…, any_setting=…)`; everything ends with the test."""
    async with AsyncExitStack() as stack:

        async def make(
            *servers: McpServer,
            registry: ListRegistry | None = None,
            redis: SharedStore | None = None,
            **overrides: object,
        ) -> McpTools:
            settings = make_settings(**overrides)
            return await stack.enter_async_context(mcp_tools(registry or ListRegistry(*servers), redis, settings))

        yield make


@pytest.fixture
async def start_http(notes: Notes, no_process_left: None) -> AsyncIterator[StartHttp]:
    """`await start_http(python=…, options=…)`: a toolbox over HTTP."""
    started: list[HttpToolbox] = []

    async def start(python: str = sys.executable, options: tuple[str, ...] = ()) -> HttpToolbox:
        toolbox = HttpToolbox(python, notes, options)
        started.append(toolbox)
        await toolbox.start()
        return toolbox

    yield start
    for toolbox in started:
        await toolbox.kill()


@pytest.fixture(params=["stdio", "stdio-old", "http", "http-old"])
async def toolbox(request: pytest.FixtureRequest, notes: Notes, start_http: StartHttp) -> McpServer:
    """The toolbox under every transport and protocol generation; `-old` is the SDK's previous release."""
    way = str(request.param)
    python = peer("python") if "old" in way else sys.executable
    if way.startswith("stdio"):
        return stdio_toolbox(notes, python=python)
    http = await start_http(python)
    return McpServer("toolbox", url=http.url)


@pytest.fixture
async def call(toolbox: McpServer, open_tools: OpenTools) -> Caller:
    """Calls tools of the `toolbox`."""
    return Caller(await open_tools(toolbox))


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def shared(redis: Redis) -> AsyncIterator[RedisFunctions]:
    """The way to Redis that a process's catalogue takes."""
    functions = RedisFunctions(redis, timeout_s=5)
    yield functions
    await functions.close()
