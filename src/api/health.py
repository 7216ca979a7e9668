"""Whether the process lives, and whether what it stands on is there, by name."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import APIRouter, Depends

from toolfleet.api.dependencies import ApiParts, Parts, known_query
from toolfleet.api.fleet_models import Live, Ready
from toolfleet.api.openapi import answer, problem, problems
from toolfleet.api.problems import ApiProblem
from toolfleet.bootstrap import Wired, package_version
from toolfleet.services.background_jobs.errors import QueueError, StoreError

CHECK_S: Final = 2.0
"""The bound of each check: a probe is asked every few seconds and must not pile up."""

router = APIRouter(prefix="/health", tags=["health"], dependencies=[Depends(known_query)])


@router.get("/live", operation_id="live", summary="Whether the process answers", responses=problems(422))
async def live() -> Live:
    """Says nothing of other parts: a restart would not bring them back."""
    return Live(version=package_version())


@router.get(
    "/ready",
    operation_id="ready",
    summary="Whether jobs can be taken and run",
    responses={
        200: answer("NATS, its streams, Redis and tools are there."),
        503: problem(
            503,
            "Something is down; `down` names it and `parts` says why.",
            example={
                "type": "urn:toolfleet:problem:not-ready",
                "title": "Not ready",
                "status": 503,
                "detail": "down: redis",
                "instance": "/health/ready",
                "down": ["redis"],
                "parts": {"nats": "up", "streams": "up", "redis": "Redis did not serve PING", "tools": "up"},
            },
        ),
        **problems(422),
    },
)
async def ready(api: ApiParts, wired: Parts) -> Ready:
    """Checks each part now, each within 2 s."""
    nats, streams, redis, tools = await asyncio.gather(_nats(wired), _streams(wired), _redis(wired), _tools(wired))
    found = {"nats": nats, "streams": streams, "redis": redis, "tools": tools}
    if api.stopping.begun:
        found["api"] = "it is stopping"
    down = [name for name, problem in found.items() if problem is not None]
    if down:
        raise ApiProblem(
            503,
            "not-ready",
            "Not ready",
            f"down: {', '.join(down)}; `toolfleet doctor` tells more",
            down=down,
            parts={name: problem or "up" for name, problem in found.items()},
        )
    return Ready(parts=dict.fromkeys(found, "up"))


async def _nats(wired: Wired) -> str | None:
    return None if wired.core.queue.connected else f"not connected: {wired.core.connection.last_error}"


async def _streams(wired: Wired) -> str | None:
    state = wired.core.queue_state
    if not state.ready:
        return state.problem
    try:
        async with asyncio.timeout(CHECK_S):
            await wired.core.queue.stats()
    except QueueError as error:
        return str(error)
    except TimeoutError:
        return f"no answer within {CHECK_S:g} s"
    return None


async def _redis(wired: Wired) -> str | None:
    try:
        async with asyncio.timeout(CHECK_S):
            await wired.core.store.ping()
    except StoreError as error:
        return str(error)
    except TimeoutError:
        return f"no answer within {CHECK_S:g} s"
    return None


async def _tools(wired: Wired) -> str | None:
    try:
        async with asyncio.timeout(CHECK_S):
            tools = await wired.catalogue.tools()
    except TimeoutError:
        return f"no tool server answered within {CHECK_S:g} s"
    return None if tools else "no tool is known: no tool server is registered, or none was ever reached"
