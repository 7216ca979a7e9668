"""Routes that read jobs: figures, pages, one job, its results, its events."""

from __future__ import annotations

import time
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Response

from toolfleet.api.dependencies import After, ApiParts, JobIdPath, Parts, Service, known_query
from toolfleet.api.fleet import stats_of
from toolfleet.api.fleet_models import Stats
from toolfleet.api.models import Job, JobList, JobResult, NotReady
from toolfleet.api.openapi import RETRY_AFTER, answer, problem, problems
from toolfleet.api.sse import EVENT_SCHEMA, EventStream
from toolfleet.api.sse import MEDIA_TYPE as SSE_TYPE
from toolfleet.api.views import JOBS_PATH, json_answer, result_of, whole_job
from toolfleet.services.background_jobs.task_models import Status, Tier

MAX_WAIT_S: Final = 60
ASK_AGAIN_S: Final = 1
"""What a client is asked to wait for a result, where it polls."""
CURSOR: Final = r"^[0-9]{1,15}_job_[0-7][0-9A-HJKMNP-TV-Z]{25}$"

router = APIRouter(prefix=JOBS_PATH, tags=["jobs"], dependencies=[Depends(known_query)])


# -- lists and figures: before /{job_id}, which would take their names for ids ----------------------------------


@router.get(
    "/stats", operation_id="job_stats", summary="The fleet's figures", tags=["fleet"], responses=problems(422, 503)
)
async def stats(wired: Parts) -> Stats:
    """Per tier: queued, running, oldest age; totals by status; workers; rates; dead letters; warnings."""
    store, queue, alive = await wired.service.stats()
    return stats_of(store, queue, list(alive), int(time.time() * 1000), wired.core.settings.tier_max_jobs)


@router.get("", operation_id="list_jobs", summary="A page of jobs", responses=problems(422, 503))
async def jobs(
    api: ApiParts,
    service: Service,
    status: Status | None = None,
    tier: Tier | None = None,
    cursor: Annotated[str | None, Query(pattern=CURSOR, description="Of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JobList:
    """Newest first."""
    page = await service.jobs(status=status, tier=tier, cursor=cursor, limit=limit)
    return JobList(jobs=[api.views.summary(record) for record in page.jobs], cursor=page.cursor)


# -- read -----------------------------------------------------------------------------------------------------


@router.get("/{job_id}", operation_id="get_job", summary="A job as it stands", responses=problems(404, 410, 422, 503))
async def get(
    api: ApiParts,
    service: Service,
    job_id: JobIdPath,
    wait: Annotated[
        float,
        Query(ge=0, le=MAX_WAIT_S, description="Seconds to hold the answer until something changes."),
    ] = 0,
) -> Job:
    """With Redis down: what the queue knows (`degraded`, `queued_or_running`), or a 503; never a false 404."""
    view = await api.stopping.unless(service.wait(job_id, wait)) if wait else None
    if view is None:
        view = await service.get(job_id)
    return await whole_job(api.views, service, view)


@router.get(
    "/{job_id}/result",
    operation_id="get_result",
    summary="The results of a job",
    response_model=JobResult,
    responses={
        200: answer("The job has ended; each call's result, in the order of the calls."),
        202: answer("The job has not ended.", model=NotReady, headers=RETRY_AFTER),
        **problems(404, 410, 503),
        422: problem(422),
    },
)
async def result(api: ApiParts, service: Service, job_id: JobIdPath) -> Response:
    """Of a failed, cancelled or unknown job it has what was stored before the end."""
    view = await service.get(job_id)
    if view.record is None or not view.record.status.terminal:
        waiting = NotReady.model_validate({**api.views.view_links(view), "degraded": view.degraded})
        return json_answer(waiting, 202, {"Retry-After": str(ASK_AGAIN_S)})
    return json_answer(result_of(view.record, await service.results(view.record)))


@router.get(
    "/{job_id}/stream",
    operation_id="stream_events",
    summary="A job's events as they happen",
    response_class=Response,
    responses={
        200: answer(
            "Server-Sent Events: `id` is the event's place in the job's log, `event` its type, `data` JSON with "
            "`job_id`, `attempt`, `at` and the event's own fields. A `gap` event (`after`, `resumes_at`; no `id`) "
            "tells that events were trimmed from the log. Comments are heartbeats; `: reconnecting` says that Redis "
            "is away. The stream ends after the terminal event.",
            content={
                SSE_TYPE: {
                    "schema": EVENT_SCHEMA,
                    "example": "event: tool.completed\n"
                    'data: {"job_id":"job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB","attempt":1,"at":"2030-01-01T12:00:00.000Z",'
                    '"tool_call_id":"call_1","tool_name":"web_crawl","duration_ms":812}\nid: 7\n\n',
                }
            },
            headers={
                "Cache-Control": {"schema": {"type": "string", "const": "no-store"}},
                "X-Accel-Buffering": {"schema": {"type": "string", "const": "no"}},
            },
        ),
        204: answer(
            "Only with `Last-Event-ID`: the job has ended and the client has its last event. By the rules of "
            "EventSource this ends the reconnecting."
        ),
        **problems(404, 410, 422, 503),
    },
)
async def stream(api: ApiParts, service: Service, job_id: JobIdPath, start: After) -> Response:
    """Reconnecting with `Last-Event-ID` gives every event of the log once, in order."""
    record = (await service.get(job_id)).record
    if record is not None and record.status.terminal and start.reconnects and start.after == record.last_event:
        return Response(status_code=204)
    ahead = record is not None and start.after > record.last_event
    events = service.events(job_id, after=0 if ahead else start.after, heartbeat_s=api.settings.sse_heartbeat)
    return EventStream(events, api.stopping, lost=start.after if ahead else None)
