"""Routes about the fleet: tools and workers; and its figures."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from toolfleet.api.dependencies import Service, known_query
from toolfleet.api.fleet_models import (
    DeadLetterFigures,
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
from toolfleet.services.background_jobs.admission import MAX_FILL
from toolfleet.services.background_jobs.ports import StoreStats, WorkerInfo
from toolfleet.services.background_jobs.queue_ports import QueueStats
from toolfleet.services.background_jobs.task_models import Millis, Tier, iso_time

NEARLY_FULL = 0.8
"""Share of the dead letter stream's size from which on a warning stands in the stats: the oldest go first."""

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
                policy="repeatable" if spec.repeatable else "once",
                policy_source=spec.policy_source,
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


def stats_of(
    store: StoreStats, queue: QueueStats | None, alive: list[WorkerInfo], now: Millis, tier_max_jobs: int
) -> Stats:
    """The fleet's figures; `now` by the clock of this process, for ages."""
    letters = _dead_letters(queue, now) if queue is not None else None
    return Stats(
        tiers={
            tier: TierFigures(
                queued=f.queued,
                running=f.running,
                oldest_age_seconds=f.oldest_age_ms / 1000,
                in_queue=queue.tiers[tier].jobs if queue else None,
                max_in_queue=tier_max_jobs,
                max_bytes=int(MAX_FILL[tier] * queue.max_bytes) if queue else None,
            )
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
            "entries go. List them with GET /api/v1/dead-letters or `toolfleet dlq list`, redrive what is wanted, "
            "discard the rest, or raise TOOLFLEET_DLQ_MAX_BYTES"
        )
    for tier, figures in store.tiers.items():
        if figures.queued and not any(info.tier is tier for info in alive):
            found.append(f"{figures.queued} jobs wait in tier {tier.value} and no worker of it is alive")
    return found
