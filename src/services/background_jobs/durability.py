"""Whether what queue and store acknowledge is on the disk by then.

Both servers were measured to lose acknowledged writes in a power cut with other settings than these: nats-server
syncs every two minutes by default, and Redis once a second with `appendfsync everysec`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from toolfleet.services.background_jobs.errors import StoreUnavailable

log = structlog.get_logger(__name__)

ASK_AGAIN_S: Final = 10.0
"""How soon a Redis that did not answer is asked again."""


@dataclass(frozen=True, slots=True)
class Durability:
    """What is known of one server's writes."""

    server: str
    """``NATS`` or ``Redis``."""
    durable: bool | None
    """None where the server does not tell."""
    found: str
    """The settings as they are, for people."""
    advice: str = ""
    """What to do where it is not durable, or not known."""


def store_durability(info: Mapping[str, str]) -> Durability:
    """Of Redis, from `server_info`: `appendonly` and `appendfsync` as CONFIG GET gives them."""
    append_only, sync = info.get("appendonly"), info.get("appendfsync")
    if append_only is None or sync is None:
        return Durability(
            "Redis", None, "not told by the server (CONFIG GET is not allowed)",
            "check that it has appendonly yes and appendfsync always",
        )  # fmt: skip
    found = f"appendonly {append_only}, appendfsync {sync}"
    if append_only == "yes" and sync == "always":
        return Durability("Redis", True, found)
    return Durability(
        "Redis", False, found,
        "a power cut can take acknowledged writes along; set appendonly yes and appendfsync always",
    )  # fmt: skip


def store_evicts(info: Mapping[str, str]) -> str | None:
    """Redis' policy where it may drop jobs when its memory is full; None where it does not, or does not tell."""
    policy = info.get("maxmemory-policy", "noeviction")
    return None if policy == "noeviction" else policy


def queue_durability(monitoring: Mapping[str, Any] | None) -> Durability:
    """Of NATS, from its monitoring's `/varz`; clients outside the system account are not told, hence None."""
    config = ((monitoring or {}).get("jetstream") or {}).get("config")
    if config is None:
        return Durability(
            "NATS", None, "not told by the server",
            "check nats.conf for sync_interval: always, or set TOOLFLEET_NATS_MONITORING_URL and ask again",
        )  # fmt: skip
    if config.get("sync_always"):
        return Durability("NATS", True, "sync_interval: always")
    seconds = config.get("sync_interval", 0) / 1e9
    return Durability(
        "NATS", False, f"sync_interval: {seconds:g} s",
        "a power cut can take acknowledged jobs along; set sync_interval: always in the jetstream block of nats.conf",
    )  # fmt: skip


async def nats_varz(url: str, timeout: float) -> Mapping[str, Any] | None:
    """`/varz` of nats-server's monitoring; None, and a warning, where it can't be had."""
    import httpx  # late: most processes have no monitoring URL, and a worker without one needs no HTTP client

    try:
        # httpx bounds each read, not the whole answer.
        async with asyncio.timeout(timeout), httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
            answer = (await client.get(f"{url.rstrip('/')}/varz")).raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
        log.warning("nats.monitoring_failed", error=str(error) or type(error).__name__)
        return None
    return answer if isinstance(answer, dict) else None


async def tell_durability(ask: Callable[[], Awaitable[Sequence[Durability]]]) -> None:
    """Log a warning for each server whose writes are not durable, as soon as both can be asked."""
    while True:
        try:
            found = await ask()
            break
        except StoreUnavailable:
            await asyncio.sleep(ASK_AGAIN_S)
    for each in found:
        if each.durable is False:
            log.warning("writes.not_durable", server=each.server, found=each.found, advice=each.advice)
