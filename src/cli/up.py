"""`toolfleet up`: the stack on this machine, kept running until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from toolfleet.cli.exits import OK, CliError
from toolfleet.cli.output import say
from toolfleet.cli.processes import write_whole
from toolfleet.cli.signals import StopSignals
from toolfleet.cli.stack import Part, Stack, StackPlan
from toolfleet.services.background_jobs.task_models import DEFAULT_TENANT, derived_job_id
from toolfleet.services.discovery.chain import build_registry
from toolfleet.services.discovery.models import DiscoveryError, ServiceNotFound
from toolfleet.services.embedded.errors import EmbeddedServerError, ServerNotRunning
from toolfleet.services.web_tools.demo_site import serve_demo_site
from toolfleet.settings import Settings

SITE_LATENCY_S: Final = 0.3
"""Of the demo site: a crawl of all of it takes some seconds, so that there is something to watch."""
DRAIN_MARGIN_S: Final = 5.0
"""What a worker gets beyond its own drain time before it is killed."""
RESTART_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Waits before a part that died is started again; the last one repeats."""
STEADY_S: Final = 30.0
"""A part that lived this long is not in a loop of crashes: the waits begin anew."""


def up(settings: Settings, data: Path | None, ready_file: Path | None) -> int:
    """Run it.

    Args:
        settings: apply to every process of the stack; where they, or Consul, name a NATS or Redis, that one is used.
        data: keeps streams and state; None for a temporary directory.
        ready_file: gets the addresses as JSON while everything is ready.

    Raises:
        CliError: the port or the directory is taken, or something did not start.
    """
    with _data_folder(data) as folder:
        return asyncio.run(_up(settings, folder, ready_file))


async def _up(settings: Settings, folder: Path, ready_file: Path | None) -> int:
    if (reason := _why_not(settings.api_host, settings.api_port)) is not None:
        # Said before anything is started; the API would only find out after its modules are loaded.
        where = f"port {settings.api_port} on {settings.api_host}"
        raise CliError(f"{where} can't be used: {reason}; choose another with --port, or stop what listens there")
    with StopSignals() as signals:
        stack = Stack(await _plan(settings, folder), say)
        try:
            await signals.unless_asked(stack.start())
            async with serve_demo_site(port=_site_port(settings.api_port), latency_s=SITE_LATENCY_S) as site:
                with _published(ready_file, stack, site):
                    print(_lines_to_try(stack, site), flush=True)
                    await _keep_running(stack, signals)
            return await _end(stack, signals)
        except EmbeddedServerError as error:
            raise CliError(str(error)) from error
        finally:
            await stack.kill()


# -- before --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _data_folder(data: Path | None) -> Iterator[Path]:
    """The folder, held by this process alone; a temporary one is removed at the end."""
    if data is None:
        folder = Path(tempfile.mkdtemp(prefix="toolfleet-up-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
        return
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / "up.lock").open("w")
    except OSError as error:
        raise CliError(f"{data} can't be used for data: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CliError(f"another `toolfleet up` uses {data}; stop it, or give this one another --data") from error
        yield data.absolute()


def _why_not(host: str, port: int) -> str | None:
    """Why a port can't be listened on; None where it can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _site_port(api_port: int) -> int:
    """The one after the API's, so that the lines of the README work; a free one where that is taken."""
    port = api_port + 1 if 0 < api_port < 65535 else 0
    if port and _why_not("127.0.0.1", port) is not None:
        say(f"port {port} is taken; the demo site gets another one")
        return 0
    return port


async def _plan(settings: Settings, folder: Path) -> StackPlan:
    registry = build_registry(settings)
    try:
        own_nats, own_redis = await _missing(registry.nats_urls), await _missing(registry.redis_url)
    except DiscoveryError as error:
        raise CliError(str(error)) from error
    finally:
        await registry.close()
    for what, own in (("NATS", own_nats), ("Redis", own_redis)):
        if not own:
            say(f"{what}: the one that the settings or Consul name; its data stays there")
    return StackPlan(
        folder,
        api_port=settings.api_port,
        worker_grace_s=settings.drain_timeout + DRAIN_MARGIN_S,
        own_nats=own_nats,
        own_redis=own_redis,
        env={"TOOLFLEET_LOG_FORMAT": "console"} if settings.log_format == "auto" else {},
        mcp_servers=_servers_of(settings.mcp_config),
    )


async def _missing(question: Any) -> bool:
    try:
        await question()
    except ServiceNotFound:
        return True
    return False


def _servers_of(config: Path | None) -> Mapping[str, Any]:
    """The operator's own tool servers, as they stand in the file; a relative `cwd` stays relative to that file."""
    if config is None:
        return {}
    try:
        servers = json.loads(config.read_bytes())["mcpServers"]
        entries = {name: dict(entry) for name, entry in servers.items()}
    except OSError as error:
        raise CliError(f"{config} can't be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CliError(f'{config} is not of the form {{"mcpServers": {{"name": {{…}}}}}}') from None
    for entry in entries.values():
        if isinstance(entry.get("cwd"), str):
            entry["cwd"] = str(config.absolute().parent / entry["cwd"])
    return entries


# -- meanwhile -----------------------------------------------------------------------------------------------------


async def _keep_running(stack: Stack, signals: StopSignals) -> None:
    """Until told to stop; a part that dies is started again."""
    keepers = [asyncio.create_task(_keep(part), name=f"keep-{part.name}") for part in stack.parts]
    try:
        asked = asyncio.ensure_future(signals.asked.wait())
        done, _ = await asyncio.wait({asked, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        for keeper in done - {asked}:
            # It never ends by itself.
            await keeper
    finally:
        for task in (asked, *keepers):
            task.cancel()
        await asyncio.gather(asked, *keepers, return_exceptions=True)


async def _keep(part: Part) -> None:
    deaths = 0
    while True:
        began = time.monotonic()
        try:
            code = await part.wait()
            reason = f"ended with exit code {code}"
        except ServerNotRunning:
            reason = "ended"
        deaths = 0 if time.monotonic() - began > STEADY_S else deaths
        wait = RESTART_S[min(deaths, len(RESTART_S) - 1)]
        deaths += 1
        say(f"{part.name} {reason}; it is started again in {wait:g} s")
        await asyncio.sleep(wait)
        try:
            await part.start()
        except EmbeddedServerError as error:
            say(f"{part.name} did not start again: {error}")
        else:
            say(f"{part.name} is back")


async def _end(stack: Stack, signals: StopSignals) -> int:
    """Drain; a second signal ends it at once."""
    say("draining: workers finish their jobs or hand them back; Ctrl-C again ends everything at once")
    drained = asyncio.create_task(stack.stop())
    insisted = asyncio.create_task(signals.insisted.wait())
    try:
        await asyncio.wait({drained, insisted}, return_when=asyncio.FIRST_COMPLETED)
        if drained.done():
            drained.result()
            say("stopped")
            return OK
        raise CliError("ended at once; jobs that ran come back when their leases end", signals.exit_code)
    finally:
        for task in (drained, insisted):
            task.cancel()
        await asyncio.gather(drained, insisted, return_exceptions=True)


# -- what it says --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _published(ready_file: Path | None, stack: Stack, site: str) -> Iterator[None]:
    """Keep the addresses in the file meanwhile."""
    if ready_file is None:
        yield
        return
    write_whole(ready_file, json.dumps({"api": stack.api_url, "site": site, "env": stack.env}, indent=2) + "\n")
    try:
        yield
    finally:
        ready_file.unlink(missing_ok=True)


def _lines_to_try(stack: Stack, site: str) -> str:
    """Commands that work as they stand: the keys make the jobs' ids known before the jobs are there."""
    run = uuid.uuid4().hex[:6]
    jobs = f"{stack.api_url}/api/v1/jobs"
    first, second = f"try-{run}", f"later-{run}"
    job, later = (derived_job_id(DEFAULT_TENANT, key) for key in (first, second))
    crawl = f'{{"tool_name":"web_crawl","tool_args":{{"url":"{site}/","max_pages":37}}}}'
    post = "curl -sw '\\n' -X POST -H 'Content-Type: application/json'"
    env = " ".join(f"{name}={value}" for name, value in stack.env.items() if value is not None and name in _SHOWN)
    # As it was called: `make up` is for people whose PATH does not have it.
    program = sys.argv[0] if Path(sys.argv[0]).name == "toolfleet" else "toolfleet"
    return f"""
toolfleet is up: API {stack.api_url}, demo site {site}

# submit a job, poll it, follow it, read its result
{post} -H 'Idempotency-Key: {first}' {jobs} -d '{{"tools":[{crawl}]}}'
curl -sw '\\n' '{jobs}/{job}?wait=5'
curl -sN {jobs}/{job}/stream
curl -sw '\\n' {jobs}/{job}/result
# cancel another one, which would start in an hour
{post} -H 'Idempotency-Key: {second}' {jobs} -d '{{"delay_seconds":3600,"tools":[{crawl}]}}'; \
curl -sw '\\n' -X POST {jobs}/{later}/cancel

# or, with the command line
TOOLFLEET_API_URL={stack.api_url} {program} submit web_crawl url={site}/ max_pages=37 --watch
{env} {program} doctor --api {stack.api_url}

Ctrl-C drains and stops."""


_SHOWN: Final = ("NATS_URL", "REDIS_URL", "TOOLFLEET_NATS_MONITORING_URL", "TOOLFLEET_MCP_CONFIG")
"""Of the stack's environment; none of these has a secret in it, since its own servers have no passwords."""
