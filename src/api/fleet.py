"""Routes about the fleet: tools, workers, dead letters."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from toolfleet.api.dependencies import Service, known_query
from toolfleet.api.fleet_models import (
    DeadLetterEntry,
    DeadLetterFigures,
    DeadLetterList,
    QueueFigures,
    Rates,
    Stats,
    TierFigures,
    Tool,
    ToolList,
    Worker,
    WorkerFigures,
    WorkerList,
)
from toolfleet.api.openapi import problems
from toolfleet.services.background_jobs.errors import MalformedTask, NewerTask
from toolfleet.services.background_jobs.ports import DeadLetter, QueueStats, StoreStats, WorkerInfo
from toolfleet.services.background_jobs.task_models import Millis, TaskDefinition, Tier, iso_time

NEARLY_FULL = 0.8
"""Share of the dead letter stream's size from which on a warning stands in the stats: the oldest go first."""
MAX_SEQ = 2**63 - 1

router = APIRouter(prefix="/api/v1", tags=["fleet"], dependencies=[Depends(known_query)])


@router.get("/tools", operation_id="list_tools", summary="What the fleet can call", responses=problems(422, 503))
async def tools(service: Service) -> ToolList:
    """From the cached catalogue, with each tool's input schema."""
    found = await service.tools()
    return ToolList(
        tools=[
            Tool(
                name=spec.name,
                server=spec.server,
                tool=spec.tool,
                description=spec.description,
                input_schema=dict(spec.input_schema),
                repeatable=spec.repeatable,
            )
            for spec in found
        ]
    )


@router.get("/workers", operation_id="list_workers", summary="Who is there", responses=problems(422, 503))
async def workers(service: Service) -> WorkerList:
    """The workers whose heartbeat has not run out."""
    return WorkerList(workers=[_worker(info) for info in await service.workers()])


def _worker(info: WorkerInfo) -> Worker:
    return Worker(
        worker_id=info.worker_id,
        tier=info.tier,
        host=info.host,
        pid=info.pid,
        version=info.version,
        state=info.state,
        started_at=iso_time(info.started_at),
        seen_at=iso_time(info.seen_at),
        slots=info.slots,
        in_flight=info.in_flight,
        done=info.done,
    )


@router.get(
    "/dead-letters", operation_id="list_dead_letters", summary="What needs a person", responses=problems(422, 503)
)
async def dead_letters(
    service: Service,
    cursor: Annotated[int, Query(ge=0, le=MAX_SEQ, description="Of the page before.")] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> DeadLetterList:
    """Oldest first."""
    page = await service.dead_letters(cursor, limit)
    return DeadLetterList(dead_letters=[_entry(letter) for letter in page.entries], cursor=page.cursor)


def _entry(letter: DeadLetter) -> DeadLetterEntry:
    try:
        tools = [call.tool_name for call in TaskDefinition.from_json(letter.payload).tools]
    except (MalformedTask, NewerTask):
        tools = []
    return DeadLetterEntry(
        seq=letter.seq,
        at=iso_time(letter.at),
        job_id=letter.job_id,
        attempt=letter.fence,
        reason=letter.reason,
        message=letter.message,
        tools=tools,
        payload_bytes=len(letter.payload),
    )


def stats_of(store: StoreStats, queue: QueueStats | None, alive: list[WorkerInfo], now: Millis) -> Stats:
    """The fleet's figures; `now` by the clock of this process, for ages."""
    letters = _dead_letters(queue, now) if queue is not None else None
    return Stats(
        tiers={
            tier: TierFigures(queued=f.queued, running=f.running, oldest_age_seconds=f.oldest_age_ms / 1000)
            for tier, f in store.tiers.items()
        },
        totals=dict(store.totals),
        rates=Rates(
            finished_last_minute=store.finished_last_minute,
            finished_last_15_minutes=store.finished_last_15_minutes,
        ),
        leases_lost=store.leases_lost,
        queue=QueueFigures(messages=queue.messages, bytes=queue.bytes, max_bytes=queue.max_bytes) if queue else None,
        dead_letters=letters,
        workers=WorkerFigures(
            total=len(alive),
            by_tier={tier: sum(info.tier is tier for info in alive) for tier in Tier},
            slots=sum(info.slots for info in alive),
            in_flight=sum(info.in_flight for info in alive),
        ),
        warnings=_warnings(queue, letters, store, alive),
    )


def _dead_letters(queue: QueueStats, now: Millis) -> DeadLetterFigures:
    oldest = queue.oldest_dead_letter_at
    return DeadLetterFigures(
        count=queue.dead_letters,
        bytes=queue.dead_letters_bytes,
        max_bytes=queue.dead_letters_max_bytes,
        oldest_at=iso_time(oldest) if oldest is not None else None,
        oldest_age_seconds=max(0, now - oldest) / 1000 if oldest is not None else None,
    )


def _warnings(
    queue: QueueStats | None, letters: DeadLetterFigures | None, store: StoreStats, alive: list[WorkerInfo]
) -> list[str]:
    found = []
    if queue is None:
        found.append("NATS can't be reached: figures of queue and dead letters are missing")
    if letters is not None and letters.bytes >= NEARLY_FULL * letters.max_bytes:
        found.append(
            f"the dead letter stream is {100 * letters.bytes / letters.max_bytes:.0f} % full, and then the oldest "
            "entries go. List them with GET /api/v1/dead-letters or `toolfleet dlq list`, submit what is still wanted "
            "again under a new Idempotency-Key, or raise TOOLFLEET_DLQ_MAX_BYTES"
        )
    for tier, figures in store.tiers.items():
        if figures.queued and not any(info.tier is tier for info in alive):
            found.append(f"{figures.queued} jobs wait in tier {tier.value} and no worker of it is alive")
    return found
