"""The catalogue: names, the shared copy, and what it says while servers or Redis are down."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.conftest import SettingsFactory
from tests.support.waiting import wait_until
from tests.tool_execution.conftest import OpenTools
from tests.tool_execution.harness import Caller, ListRegistry, Notes, old_stdio, stdio_toolbox, text
from toolfleet.services.background_jobs.errors import ToolUnavailable, UnknownTool
from toolfleet.services.background_jobs.redis_functions import RedisFunctions
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.catalogue import CachedCatalogue

DEAD = McpServer("dead", url="http://127.0.0.1:1/mcp")


class Listings:
    """A `ToolLister` whose servers a test sets; a server without an entry can't be reached."""

    def __init__(self, **servers: list[dict[str, Any]] | None) -> None:
        self.servers = servers
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def names(self) -> list[str]:
        return sorted(self.servers)

    async def list_tools(self, name: str) -> list[dict[str, Any]]:
        self.asked.append(name)
        await self.gate.wait()
        listing = self.servers[name]
        if listing is None:
            raise ToolUnavailable(f"{name} is down")
        return listing


def tool(name: str, **annotations: bool) -> dict[str, Any]:
    return {"name": name, "inputSchema": {"type": "object"}, "annotations": annotations}


def names(specs: Any) -> list[str]:
    return [spec.name for spec in specs]


async def until_refreshed(catalogue: CachedCatalogue) -> None:
    await wait_until(lambda: catalogue._refreshing is None, "the refresh is over")


# -- names -----------------------------------------------------------------------------------------------------


async def test_tools_of_real_servers_with_one_name_are_told_apart(notes: Notes, open_tools: OpenTools) -> None:
    tools = await open_tools(stdio_toolbox(notes, "one"), stdio_toolbox(notes, "two"), old_stdio())

    with pytest.raises(UnknownTool, match="'one/echo' or 'two/echo'") as caught:
        await Caller(tools)("echo", text="x")
    assert caught.value.details["nearest"] == ["one/echo", "two/echo"]

    call = Caller(tools)
    pids = {json.loads(text(await call(f"{server}/about")))["pid"] for server in ("one", "two")}
    assert len(pids) == 2
    assert (await tools.catalogue.find("two/echo")).name == "two/echo"
    assert (await tools.catalogue.find("old/old_echo")).name == "old_echo"
    # The listing of the old server has two pages.
    assert {"old_echo", "one/echo", "second_page", "two/echo"} < set(names(await tools.catalogue.tools()))


async def test_a_spec_says_what_the_server_says(notes: Notes, open_tools: OpenTools) -> None:
    catalogue = (
        await open_tools(stdio_toolbox(notes), tool_policy={"steps": "repeatable", "toolbox/add": "once"})
    ).catalogue

    echo = await catalogue.find("echo")
    assert (echo.server, echo.tool, echo.name, echo.repeatable) == ("toolbox", "echo", "echo", True)
    assert echo.description == "Gives the text back."
    assert echo.input_schema["required"] == ["text"]
    assert not (await catalogue.find("once")).repeatable
    assert (await catalogue.find("steps")).repeatable
    assert not (await catalogue.find("add")).repeatable


@pytest.mark.promise("G5")
async def test_the_policy_of_a_real_servers_tools_and_who_says_so(notes: Notes, open_tools: OpenTools) -> None:
    catalogue = (await open_tools(stdio_toolbox(notes))).catalogue
    found = {spec.tool: (spec.repeatable, spec.policy_source) for spec in await catalogue.tools()}
    assert (found["echo"], found["add"]) == ((True, "annotation"), (True, "annotation"))
    assert found["once"] == (False, "default")

    # A server that is not trusted: whatever its tools say of themselves, none of them runs twice.
    policy = {"toolbox/*": "once", "toolbox/steps": "repeatable"}
    catalogue = (await open_tools(stdio_toolbox(notes), tool_policy=policy)).catalogue
    for spec in await catalogue.tools():
        assert (spec.repeatable, spec.policy_source) == (spec.tool == "steps", "setting")


async def test_a_misspelt_entry_of_the_policy_is_told_once(
    notes: Notes, open_tools: OpenTools, caplog: pytest.LogCaptureFixture
) -> None:
    policy = {"toolbox/ehco": "once", "toolbox/*": "once", "dead/order": "once"}
    tools = await open_tools(stdio_toolbox(notes), DEAD, tool_policy=policy, catalogue_ttl=0.001)
    catalogue = tools.catalogue
    assert isinstance(catalogue, CachedCatalogue)
    for _ in range(3):
        await catalogue.find("echo")
        await until_refreshed(catalogue)
    told = [record.getMessage() for record in caplog.records if "TOOLFLEET_TOOL_POLICY" in record.getMessage()]
    assert len(told) == 1, "once, and nothing of a server that was not reached"
    assert "'toolbox/ehco'" in told[0]
    assert "near: toolbox/echo" in told[0]


async def test_an_unknown_name_is_refused_with_the_nearest(make_settings: SettingsFactory) -> None:
    catalogue = CachedCatalogue(Listings(web=[tool("web_crawl"), tool("web_search")]), None, make_settings())

    with pytest.raises(UnknownTool, match="web_crawl") as caught:
        await catalogue.find("web_crwal")

    assert caught.value.details["nearest"][0] == "web_crawl"
    await catalogue.close()


# -- freshness -------------------------------------------------------------------------------------------------


async def test_a_tool_that_was_just_deployed_is_found(make_settings: SettingsFactory) -> None:
    servers = Listings(a=[tool("one")])
    catalogue = CachedCatalogue(servers, None, make_settings(), look_again_s=0)
    await catalogue.find("one")
    servers.servers = {"a": [tool("one")], "b": [tool("two")]}

    assert (await catalogue.find("two")).server == "b"
    await catalogue.close()


async def test_unknown_names_ask_the_servers_at_a_bounded_rate(make_settings: SettingsFactory) -> None:
    servers = Listings(a=[tool("one")])
    catalogue = CachedCatalogue(servers, None, make_settings(), look_again_s=3600)
    await catalogue.find("one")
    asked = len(servers.asked)

    for name in ("x", "y", "z"):
        with pytest.raises(UnknownTool):
            await catalogue.find(name)

    assert len(servers.asked) <= asked + 1
    await catalogue.close()


async def test_a_known_tool_is_found_without_waiting_for_an_old_copys_refresh(
    make_settings: SettingsFactory,
) -> None:
    servers = Listings(a=[tool("one")])
    catalogue = CachedCatalogue(servers, None, make_settings(catalogue_ttl=0.001))
    await catalogue.find("one")
    await until_refreshed(catalogue)
    servers.gate.clear()
    servers.servers = {"a": [tool("one", readOnlyHint=True)]}

    asked = len(servers.asked)

    async def refresh_begun() -> bool:
        assert not (await catalogue.find("one")).repeatable
        return len(servers.asked) > asked

    await wait_until(refresh_begun, "a refresh has begun beside the old copy")
    assert not (await catalogue.find("one")).repeatable

    async def repeatable() -> bool:
        return (await catalogue.find("one")).repeatable

    servers.gate.set()
    await wait_until(repeatable, "the refresh is seen")
    await catalogue.close()


async def test_a_slow_server_does_not_hold_up_what_another_offers(make_settings: SettingsFactory) -> None:
    servers = Listings(quick=[tool("one")])
    catalogue = CachedCatalogue(servers, None, make_settings(mcp_connect_timeout=30), look_again_s=0)
    await catalogue.find("one")

    class Stuck(Listings):
        async def list_tools(self, name: str) -> list[dict[str, Any]]:
            if name == "stuck":
                await asyncio.Event().wait()
            return await super().list_tools(name)

    catalogue._servers = Stuck(quick=[tool("one"), tool("two")], stuck=[])
    assert (await catalogue.find("quick/two")).server == "quick"
    await catalogue.close()


# -- servers that are down ----------------------------------------------------------------------------------------


async def test_with_no_server_ever_reached_nothing_is_called_unknown(open_tools: OpenTools) -> None:
    nothing = (await open_tools()).catalogue
    with pytest.raises(ToolUnavailable, match="TOOLFLEET_MCP_CONFIG"):
        await nothing.find("echo")

    dead = (await open_tools(DEAD)).catalogue
    with pytest.raises(ToolUnavailable, match="can't be reached"):
        await dead.find("echo")


async def test_the_runner_does_not_call_unknown_what_an_unreached_server_may_offer(
    notes: Notes, open_tools: OpenTools
) -> None:
    tools = await open_tools(stdio_toolbox(notes), DEAD)
    await tools.catalogue.find("echo")

    with pytest.raises(UnknownTool):
        await tools.catalogue.find("nonsense")
    with pytest.raises(ToolUnavailable, match="dead"):
        await tools.runner.describe("nonsense")
    with pytest.raises(ToolUnavailable, match="dead"):
        await tools.catalogue.find("dead/nonsense")
    with pytest.raises(UnknownTool):
        await tools.runner.describe("toolbox/nonsense")


async def test_the_shared_copy_decides_while_the_servers_are_down(
    shared: RedisFunctions, make_settings: SettingsFactory
) -> None:
    first = CachedCatalogue(Listings(a=[tool("one", idempotentHint=True)]), shared, make_settings())
    await first.find("one")
    await until_refreshed(first)

    for servers in (Listings(a=None), Listings()):  # it is down; it has even left the registry
        second = CachedCatalogue(servers, shared, make_settings(catalogue_ttl=0.001), look_again_s=0)
        spec = await second.find("one")
        assert (spec.server, spec.repeatable) == ("a", True)
        with pytest.raises(UnknownTool):
            await second.find("other")
        assert (await second.find("one")).server == "a"
        await second.close()


async def test_processes_share_one_listing(shared: RedisFunctions, make_settings: SettingsFactory) -> None:
    servers = Listings(a=[tool("one")])
    for _ in range(3):
        catalogue = CachedCatalogue(servers, shared, make_settings(catalogue_ttl=60))
        await catalogue.find("one")
        await until_refreshed(catalogue)

    assert servers.asked == ["a"]


async def test_a_server_that_left_makes_no_name_ambiguous(
    shared: RedisFunctions, make_settings: SettingsFactory
) -> None:
    first = CachedCatalogue(Listings(before=[tool("one")]), shared, make_settings())
    await first.find("one")
    await until_refreshed(first)

    second = CachedCatalogue(Listings(now=[tool("one")]), shared, make_settings())
    await second.tools()
    await until_refreshed(second)

    assert (await second.find("one")).server == "now"
    assert names(await second.tools()) == ["one"]
    assert (await second.find("before/one")).server == "before"


async def test_no_key_is_without_a_ttl(redis: Redis, shared: RedisFunctions, make_settings: SettingsFactory) -> None:
    catalogue = CachedCatalogue(Listings(a=[tool("one")], b=[tool("two")]), shared, make_settings())
    await catalogue.find("one")
    await until_refreshed(catalogue)

    keys = sorted(await redis.keys("*"))
    assert keys == [b"tf:catalogue:a", b"tf:catalogue:b", b"tf:catalogue_servers"]
    for key in keys:
        assert 6 * 86_400 < await redis.ttl(key) <= 7 * 86_400
    stored = await redis.get("tf:catalogue:a")
    assert stored is not None
    kept = json.loads(stored)
    assert set(kept) == {"v", "server", "version", "fetched_at", "tools"}


async def test_without_redis_memory_serves(make_settings: SettingsFactory) -> None:
    async with Redis.from_url("redis://127.0.0.1:1") as client:
        nowhere = RedisFunctions(client, timeout_s=5)
        catalogue = CachedCatalogue(Listings(a=[tool("one")]), nowhere, make_settings())

        assert (await catalogue.find("one")).server == "a"
        assert names(await catalogue.tools()) == ["one"]
        await catalogue.close()
        await nowhere.close()


async def test_what_another_version_wrote_is_left_alone(
    redis: Redis, shared: RedisFunctions, make_settings: SettingsFactory
) -> None:
    await redis.zadd("tf:catalogue_servers", {"a": 1, "b": 2, "c": 3})
    await redis.set("tf:catalogue:a", "no json")
    await redis.set("tf:catalogue:b", json.dumps({"v": 2}))

    catalogue = CachedCatalogue(Listings(d=[tool("one")]), shared, make_settings())

    assert (await catalogue.find("one")).server == "d"
    await catalogue.close()


async def test_a_registry_that_fails_leaves_what_is_known(notes: Notes, open_tools: OpenTools) -> None:
    registry = ListRegistry(stdio_toolbox(notes))
    tools = await open_tools(registry=registry, catalogue_ttl=0.001)
    call = Caller(tools)
    await call("echo", text="x")

    registry.down = True
    assert text(await call("echo", text="still")) == "still"

    broken = await open_tools(registry=registry)
    with pytest.raises(ToolUnavailable, match="the registry is down"):
        await (broken.servers).names()
