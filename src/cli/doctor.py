"""`toolfleet doctor`: what is reachable, in which version, set how, and what to do where something is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Final, Literal

from toolfleet.bootstrap import Core, open_core
from toolfleet.cli.client import JobsClient
from toolfleet.cli.exits import FAILED, OK, CliError
from toolfleet.cli.output import out, print_json
from toolfleet.services.background_jobs.durability import (
    Durability,
    nats_varz,
    queue_durability,
    store_durability,
    store_evicts,
)
from toolfleet.services.background_jobs.errors import QueueError, StoreError, StoreUnavailable, ToolFailure
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.discovery.chain import build_registry
from toolfleet.services.discovery.consul_client import ConsulClient
from toolfleet.services.discovery.models import DiscoveryError, McpServer
from toolfleet.services.telemetry.logs import configure_logging, without_credentials
from toolfleet.settings import Settings

State = Literal["ok", "unsure", "wrong"]
CONSUL_TIMEOUT_S: Final = 5.0
CHECK_S: Final = 6.0
"""For each check; above the 5 s that the parts themselves wait for an answer, which tell more when they give up."""
TOOL_SERVER_S: Final = 10.0
"""A server of the stdio kind is started for this, and loads its libraries first."""
_NO_ANSWER: Final = ("TimeoutError", "nats: timeout", "not connected yet")
"""What `NatsConnection.last_error` is where a connection is taken and nothing is sent on it."""
_STORE_ADVICE: Final = " Check REDIS_URL and `toolfleet doctor`."
_READY_ADVICE: Final = "; `toolfleet doctor` tells more"
"""Advice of others that is no use in here."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    part: str
    state: State
    """`unsure` is worth knowing and not counted as a failure."""
    found: str
    advice: str = ""
    """What to do; empty where it is ok."""


def doctor(settings: Settings, api: str, *, accept_stream: bool, as_json: bool) -> int:
    """Look at everything and print it; 1 where something is wrong."""
    # What goes wrong is told in the table; lines of log between its rows would say it twice.
    configure_logging(settings.model_copy(update={"log_level": "error"}))
    checks = asyncio.run(_examine(settings, api, accept_stream=accept_stream))
    well = all(check.state != "wrong" for check in checks)
    if as_json:
        print_json({"ok": well, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks)
    return OK if well else FAILED


def _print(checks: list[Check]) -> None:
    console = out()
    styles = {"ok": "green", "unsure": "yellow", "wrong": "bold red"}
    width = max(len(check.part) for check in checks)
    for check in checks:
        console.print(f"{check.state:<7}", style=styles[check.state], end="")
        console.print(f"{check.part:<{width}}  {check.found}", markup=False)
        if check.advice:
            console.print(f"{'':<7}{'':<{width}}  {check.advice}", markup=False)


async def _examine(settings: Settings, api: str, *, accept_stream: bool) -> list[Check]:
    async def api_then_tools() -> list[Check]:
        # The API asks the same servers, for 2 s: those that start meanwhile would take its time.
        return [*await _bounded("API", _api(api)), *await _tools(settings)]

    of_core, others = await asyncio.gather(_core_checks(settings, accept_stream=accept_stream), api_then_tools())
    return [*of_core, *others]


async def _bounded(part: str, looking: Awaitable[list[Check]], limit_s: float = CHECK_S) -> list[Check]:
    """What was found, or that it was not found out in time: one server that hangs must not hold up the others."""
    try:
        async with asyncio.timeout(limit_s):
            return await looking
    except TimeoutError:
        return [Check(part, "wrong", f"no answer within {limit_s:g} s", "see whether it hangs or is overloaded")]


async def _core_checks(settings: Settings, *, accept_stream: bool) -> list[Check]:
    checks, known = await _addresses(settings)
    if not known:
        return checks
    async with open_core(settings, name="doctor", prepare=False) as core:
        parts = await asyncio.gather(
            _bounded("NATS", _nats(core)),
            _bounded("Redis", _redis(core)),
            _bounded("writes of NATS", _nats_writes(core)),
        )
        checks += [check for part in parts for check in part]
        if core.connection.connected and all(check.part != "Redis" or check.state == "ok" for check in checks):
            joint = await asyncio.gather(
                _bounded("stream and store", _stream_identity(core, accept_stream)), _bounded("workers", _workers(core))
            )
            checks += [check for part in joint for check in part]
    return checks


async def _tools(settings: Settings) -> list[Check]:
    registry = build_registry(settings)
    try:
        async with asyncio.timeout(CHECK_S):
            servers = await registry.mcp_servers()
    except DiscoveryError as error:
        return [Check("tools", "wrong", str(error), "correct the file or the registry that it names")]
    except TimeoutError:
        return [Check("tools", "wrong", f"the registry gave no answer within {CHECK_S:g} s", "check CONSUL_HTTP_ADDR")]
    finally:
        await registry.close()
    return await _tool_servers(settings, servers)


async def _addresses(settings: Settings) -> tuple[list[Check], bool]:
    """Whether it is known where NATS and Redis are, and Consul, where one is configured."""
    registry = build_registry(settings)

    async def located(part: str, question: Callable[[], Awaitable[object]]) -> list[Check]:
        try:
            await question()
        except DiscoveryError as error:
            return [Check(part, "wrong", "not configured", str(error))]
        return []

    asked = [
        _bounded("NATS", located("NATS", registry.nats_urls)),
        _bounded("Redis", located("Redis", registry.redis_url)),
    ]
    if settings.consul_http_addr:
        asked.insert(0, _bounded("Consul", _consul(settings, settings.consul_http_addr)))
    try:
        checks = [check for part in await asyncio.gather(*asked) for check in part]
    finally:
        await registry.close()
    return checks, all(check.part == "Consul" for check in checks)


async def _consul(settings: Settings, address: str) -> list[Check]:
    import consul
    import httpx

    token = settings.consul_http_token.get_secret_value() if settings.consul_http_token else None
    client = ConsulClient(address, token, CONSUL_TIMEOUT_S)
    try:
        version = (await client.agent.self())["Config"]["Version"]
        return [Check("Consul", "ok", f"{version} at {address}")]
    except consul.ConsulException as error:
        return [Check("Consul", "wrong", f"{address} refused: {error}", "check CONSUL_HTTP_TOKEN: it needs agent:read")]
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        return [
            Check("Consul", "wrong", f"{address} does not answer: {reason}", "check CONSUL_HTTP_ADDR and the agent")
        ]
    finally:
        await client.http.close()


async def _nats(core: Core) -> list[Check]:
    where = ", ".join(without_credentials(url) for url in await core.registry.nats_urls())
    if not core.connection.connected:
        reason = core.connection.last_error
        if reason in _NO_ANSWER:
            return [Check("NATS", "wrong", f"{where}: no answer to the connection",
                          "see whether nats-server hangs or is paused, or correct NATS_URL")]  # fmt: skip
        return [Check("NATS", "wrong", f"{where}: {reason}", "start nats-server, or correct NATS_URL")]
    try:
        report = await core.queue.settings_report()
    except QueueError as error:
        return [Check("NATS", "wrong", f"{where}: {error}", "start nats-server with JetStream: -js, or jetstream {}")]
    checks = [Check("NATS", "ok", f"nats-server {report.pop('server')} at {where}")]
    for name, state in report.items():
        part = f"stream {name}" if "/" not in name else f"consumer {name.partition('/')[2]}"
        if state == "ok":
            checks.append(Check(part, "ok", "as it must be"))
        elif state == "missing":
            checks.append(Check(part, "unsure", "not there yet", "the first worker or API that starts makes it"))
        else:
            what, _, advice = state.partition(". ")
            checks.append(Check(part, "wrong", what, advice))
    return checks


async def _redis(core: Core) -> list[Check]:
    where = without_credentials(await core.registry.redis_url())
    try:
        await core.store.ping()
        info = await core.store.server_info()
    except StoreUnavailable as error:
        # The error's own advice is to run this.
        reason = str(error).removesuffix(_STORE_ADVICE).rstrip(". ")
        return [Check("Redis", "wrong", f"{where}: {reason}", "start the server, or correct REDIS_URL")]
    except StoreError as error:
        # CONFIG GET may be refused; everything else would have failed with the ping.
        return [Check("Redis", "ok", where), Check("writes of Redis", "unsure", f"not told: {error}")]
    checks = [Check("Redis", "ok", f"{info['server']} {info['version']} at {where}")]
    checks.append(_writes(store_durability(info)))
    if policy := store_evicts(info):
        checks.append(
            Check(
                "memory of Redis", "wrong", f"maxmemory-policy {policy}: a full server drops jobs",
                "set maxmemory-policy noeviction",
            )
        )  # fmt: skip
    return checks


async def _nats_writes(core: Core) -> list[Check]:
    url = core.settings.nats_monitoring_url
    return [_writes(queue_durability(await nats_varz(url, CHECK_S / 2) if url else None))]


def _writes(told: Durability) -> Check:
    state: State = "ok" if told.durable else "unsure" if told.durable is None else "wrong"
    return Check(
        f"writes of {told.server}", state, f"durable: {told.found}" if told.durable else told.found, told.advice
    )


async def _stream_identity(core: Core, accept: bool) -> list[Check]:
    return [await _identity_check(core, accept)]


async def _identity_check(core: Core, accept: bool) -> Check:
    """Whether the stream is the one that the store's jobs were queued in (`bootstrap.prepare_queue`)."""
    stream, part = core.queue.names.tasks, "stream and store"
    try:
        identity = await core.queue.identity()
        if identity is None:
            return Check(part, "ok", "no stream yet")
        created, messages = identity
        known = await core.store.stream_identity(stream, created)
        if known == created:
            return Check(part, "ok", f"belong together since {created}")
        if accept:
            await core.store.adopt_stream(stream, created)
            return Check(part, "ok", f"the stream made at {created} is accepted in place of the one made at {known}")
    except (QueueError, StoreError) as error:
        return Check(part, "wrong", str(error), "ask again once both answer")
    if messages:
        return Check(part, "unsure", f"the stream was made at {created}, the store knows one made at {known}",
                     "the next worker that starts takes the new one over, since there are messages in it")  # fmt: skip
    return Check(
        part, "wrong", f"the stream was made at {created} and is empty, the store's jobs belong to one made at {known}",
        "where the old one is gone for good: toolfleet doctor --accept-stream; its jobs are then queued again",
    )  # fmt: skip


async def _workers(core: Core) -> list[Check]:
    try:
        workers = await core.store.workers()
    except StoreError as error:
        return [Check("workers", "wrong", str(error), "ask again once Redis answers")]
    counts = {tier: sum(worker.tier is tier for worker in workers) for tier in Tier}
    found = ", ".join(f"{count} {tier.value}" for tier, count in counts.items())
    without = [tier.value for tier, count in counts.items() if not count]
    if without:
        advice = f"jobs of these tiers wait: {', '.join(without)}; start a worker with toolfleet worker --tier TIER"
        return [Check("workers", "unsure", found, advice)]
    return [Check("workers", "ok", found)]


async def _api(url: str) -> list[Check]:
    advice = "start it with toolfleet api, or say where it is with --api or TOOLFLEET_API_URL"
    try:
        async with JobsClient(url, tell=lambda _: None) as client:
            parts = (await client.ready()).get("parts", {})
    except CliError as error:
        if error.document is None:
            return [Check("API", "wrong", f"{url} can't be reached", advice)]
        reason = str(error).removesuffix(_READY_ADVICE)
        return [Check("API", "wrong", f"{url} is not ready: {reason}", "see what it names above, and the API's log")]
    return [Check("API", "ok", f"{url}: {', '.join(parts)} {'are' if len(parts) > 1 else 'is'} there")]


async def _tool_servers(settings: Settings, servers: list[McpServer]) -> list[Check]:
    if not servers:
        return [Check("tools", "unsure", "no tool server is registered",
                      "set TOOLFLEET_MCP_CONFIG, or register one in Consul with the tag 'mcp'")]  # fmt: skip
    # Imported late: the MCP SDK takes longer to load than all other checks together.
    from toolfleet.services.tool_execution.mcp_servers import McpServers
    from toolfleet.services.tool_execution.policy import unused_overrides

    registry = build_registry(settings)
    links = McpServers(registry, settings)

    listed: dict[str, list[str]] = {}

    async def look(server: McpServer) -> list[Check]:
        part = f"tools of {server.name}"
        try:
            tools = await links.list_tools(server.name)
        except ToolFailure as error:
            return [Check(part, "wrong", f"{server.location}: {error}", "start the server, or correct its entry")]
        listed[server.name] = [str(tool["name"]) for tool in tools]
        names = ", ".join(listed[server.name]) or "no tools"
        return [Check(part, "ok", f"{server.location}: {names}")]

    try:
        found = await asyncio.gather(
            *(_bounded(f"tools of {server.name}", look(server), TOOL_SERVER_S) for server in servers)
        )
        unlisted = [server.name for server in servers if server.name not in listed]
        unused = unused_overrides(settings.tool_policy, listed, unlisted)
        policy = [Check("tool policy", "unsure", told, "correct the entry: it changes nothing") for told in unused]
        return [*(check for part in found for check in part), *policy]
    finally:
        await links.close()
        await registry.close()
