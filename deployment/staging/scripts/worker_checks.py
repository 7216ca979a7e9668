"""What a worker needs of its surroundings, looked at without changing them."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final, Literal, NamedTuple

import structlog
from pydantic import ValidationError
from pydantic_settings import SettingsError
from redis.exceptions import RedisError

from toolfleet.bootstrap import Core, durability, open_core, package_version, redis_client
from toolfleet.services.background_jobs.durability import store_evicts
from toolfleet.services.background_jobs.errors import QueueError, StoreError
from toolfleet.services.background_jobs.nats_connection import NatsConnection
from toolfleet.services.discovery.chain import build_registry
from toolfleet.services.discovery.models import DiscoveryError, McpServer
from toolfleet.services.discovery.registry import Registry
from toolfleet.services.telemetry.logs import without_credentials
from toolfleet.settings import Settings

MIN_REDIS: Final = 7
"""FUNCTION LOAD and FCALL came with Redis 7.0."""

Level = Literal["ok", "note", "warning", "missing", "unchecked"]


class Finding(NamedTuple):
    """What one check found; `missing` keeps a worker from starting."""

    level: Level
    part: str
    text: str

    def line(self) -> str:
        """For people, and for `grep '^missing'`. Credentials that an error has quoted are left out."""
        return without_credentials(f"{self.level:<9}  {self.part}: {self.text}")


def is_missing(findings: list[Finding]) -> bool:
    """Whether a worker can't start."""
    return any(finding.level == "missing" for finding in findings)


async def check_environment() -> list[Finding]:
    """Everything, for `--check`."""
    # What the parts log while they are tried is what the findings say.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    found = [
        Finding("ok", "Python", f"{sys.version.split()[0]} ({sys.executable})"),
        Finding("ok", "package", f"toolfleet {package_version()}"),
        *check_settings(),
    ]
    if is_missing(found):
        rest = "state directory, NATS, Redis, Consul and MCP servers"
        return [*found, Finding("unchecked", rest, "the settings that are not valid may be about them")]
    return [*found, *await check_surroundings(Settings())]


def check_settings() -> list[Finding]:
    """Every variable that does not parse, by its name; never its value."""
    try:
        Settings()
    except ValidationError as error:
        return [
            Finding("missing", "settings", f"{_variable(each['loc'])} is not valid: {each['msg']}")
            for each in error.errors(include_input=False, include_url=False, include_context=False)
        ]
    except SettingsError as error:
        field = re.search(r'field "(\w+)"', str(error))
        variable = _variable((field[1],)) if field else str(error)
        return [Finding("missing", "settings", f"{variable} is not JSON; see env.example for its form")]
    return [Finding("ok", "settings", "all that are set are valid")]


def _variable(location: tuple[int | str, ...]) -> str:
    name, *inside = map(str, location)
    variable = f"TOOLFLEET_{name.upper()}" if name in Settings.model_fields else name
    return ".".join([variable, *inside])


async def check_surroundings(settings: Settings, *, writes: bool = True) -> list[Finding]:
    """Everything outside the process, within about twice `redis_timeout`.

    Args:
        settings: where things are.
        writes: look also at the durability of writes; a worker that runs tells of it by itself.
    """
    state_dir = [check_state_dir(settings.state_dir)]
    try:
        registry = build_registry(settings)
    except DiscoveryError as error:
        return [*state_dir, Finding("missing", "Consul", str(error))]
    try:
        groups = await asyncio.gather(
            _check_consul(settings), _check_servers(settings, registry, writes), _check_mcp(registry)
        )
    finally:
        await registry.close()
    return [*state_dir, *(finding for group in groups for finding in group)]


def check_state_dir(path: Path) -> Finding:
    """Whether pid files, logs and status files can be written there; a missing directory is not made."""
    standing = path.absolute()
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    try:
        with tempfile.TemporaryFile(dir=standing):
            pass
    except OSError as error:
        hint = "set TOOLFLEET_STATE_DIR to a directory that this user may write"
        return Finding("missing", "state directory", f"{path} can't be written: {error.strerror}; {hint}")
    return Finding("ok", "state directory", f"{path} can be {'written' if standing == path.absolute() else 'made'}")


async def _check_consul(settings: Settings) -> list[Finding]:
    if settings.consul_http_addr is None:
        return []
    # Asked by itself: beside a file with MCP servers an agent that is away is no failure to the registry.
    registry = build_registry(settings.model_copy(update={"mcp_config": None}))
    try:
        servers = await registry.mcp_servers()
    except DiscoveryError as error:
        needed = settings.nats_url is None or settings.redis_url is None or settings.mcp_config is None
        return [Finding("missing" if needed else "warning", "Consul", str(error))]
    finally:
        await registry.close()
    return [Finding("ok", "Consul", f"answers; MCP servers there: {_names(servers)}")]


# -- NATS and Redis -------------------------------------------------------------------------------------------


async def _check_servers(settings: Settings, registry: Registry, writes: bool) -> list[Finding]:
    unknown = []
    nats: list[str] = []
    redis = ""
    try:
        nats = await registry.nats_urls()
    except DiscoveryError as error:
        unknown.append(Finding("missing", "NATS", str(error)))
    try:
        redis = await registry.redis_url()
    except DiscoveryError as error:
        unknown.append(Finding("missing", "Redis", str(error)))
    if unknown:
        # The parts of a worker are made of both. That the other one answers at all can be seen without them.
        reached = [*(await _reach_nats(nats) if nats else []), *(await _reach_redis(settings, redis) if redis else [])]
        return [*unknown, *reached]
    try:
        async with open_core(settings, name="toolfleet-check", prepare=False) as core:
            groups = await asyncio.gather(_check_nats(core), _check_redis(core, writes))
    except DiscoveryError as error:
        return [Finding("missing", "NATS", str(error))]
    return [finding for group in groups for finding in group]


def _nats_away(connection: NatsConnection) -> Finding:
    hint = "check that nats-server runs, and NATS_URL"
    return Finding("missing", "NATS", f"can't be reached ({connection.last_error}); {hint}")


async def _reach_nats(urls: list[str]) -> list[Finding]:
    connection = NatsConnection(urls, name="toolfleet-check")
    try:
        return [Finding("ok", "NATS", "answers")] if await connection.start() else [_nats_away(connection)]
    finally:
        await connection.close()


async def _reach_redis(settings: Settings, url: str) -> list[Finding]:
    client = redis_client(settings, url)
    try:
        async with asyncio.timeout(settings.redis_timeout):
            await client.ping()
    except (RedisError, OSError, TimeoutError) as error:
        hint = "check that it runs, and REDIS_URL"
        return [Finding("missing", "Redis", f"can't be used: {str(error) or type(error).__name__}; {hint}")]
    finally:
        await client.aclose()
    return [Finding("ok", "Redis", "answers")]


async def _check_nats(core: Core) -> list[Finding]:
    if not core.connection.connected:
        return [_nats_away(core.connection)]
    try:
        report = await core.queue.settings_report()
    except QueueError as error:
        return [Finding("missing", "NATS", f"JetStream can't be used: {error}; start nats-server with nats.conf")]
    server = Finding("ok", "NATS", f"nats-server {report.pop('server')} with JetStream")
    # What is not there yet is made by the first process that needs it.
    wrong = [Finding("missing", "streams", state) for state in report.values() if state not in ("ok", "missing")]
    return [server, *(wrong or [Finding("ok", "streams", "as they must be, or not made yet")])]


async def make_streams(settings: Settings) -> list[Finding]:
    """What keeps the streams from being made, as a worker does at its start; only trying it tells.

    Raises:
        DiscoveryError, QueueError: as `open_core`.
    """
    async with open_core(settings, name="toolfleet-check") as core:
        if core.queue_state.ready:
            return []
        return [Finding("missing", "streams", f"can't be made: {core.queue_state.problem}")]


async def _check_redis(core: Core, writes: bool) -> list[Finding]:
    try:
        await core.store.ping()
        told = await durability(core) if writes else []
    except StoreError as error:
        return [Finding("missing", "Redis", f"can't be used: {error}")]
    found = [
        Finding(
            "note" if each.durable is None else "warning", f"writes of {each.server}", f"{each.found}; {each.advice}"
        )
        for each in told
        if not each.durable
    ]
    try:
        info = await core.store.server_info()
    except StoreError as error:
        # Hosted servers refuse CONFIG; that is no reason not to work.
        return [
            Finding("ok", "Redis", "answers"),
            Finding("note", "Redis", f"does not tell its settings: {error}"),
            *found,
        ]
    version = f"{info['server']} {info['version']}"
    major = info["version"].partition(".")[0]
    if major.isdigit() and int(major) < MIN_REDIS:
        return [Finding("missing", "Redis", f"{version} is too old; {MIN_REDIS}.0 or later, or Valkey, is needed")]
    if policy := store_evicts(info):
        problem = f"maxmemory-policy is {policy}, so a full server drops jobs; set it to noeviction"
        found.append(Finding("warning", "memory of Redis", problem))
    return [Finding("ok", "Redis", version), *found]


# -- MCP ------------------------------------------------------------------------------------------------------


async def _check_mcp(registry: Registry) -> list[Finding]:
    try:
        servers = await registry.mcp_servers()
    except DiscoveryError as error:
        return [Finding("missing", "MCP servers", str(error))]
    if not servers:
        hint = "set TOOLFLEET_MCP_CONFIG, or register servers with the tag 'mcp' in Consul"
        return [Finding("warning", "MCP servers", f"there are none, so every job would fail; {hint}")]
    found = [Finding("ok", "MCP servers", _names(servers))]
    for server in servers:
        # A name with a slash is looked for in the server's own directory, by the server's launcher.
        if server.command and "/" not in server.command and not shutil.which(server.command, path=_path(server)):
            problem = f"{server.name}: there is no program '{server.command}' on PATH; its tools can't be called"
            found.append(Finding("warning", "MCP servers", problem))
    return found


def _path(server: McpServer) -> str | None:
    return server.env.get("PATH")


def _names(servers: list[McpServer]) -> str:
    return ", ".join(server.name for server in servers) or "none"
