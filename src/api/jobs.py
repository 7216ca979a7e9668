"""Routes of jobs."""

from __future__ import annotations

import time
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel

from toolfleet.api.bodies import body_schema, json_body
from toolfleet.api.dependencies import After, ApiParts, IdempotencyKey, JobIdPath, Service, SubmitKey
from toolfleet.api.fleet import stats_of
from toolfleet.api.fleet_models import Stats
from toolfleet.api.models import (
    CancelOutcome,
    Decision,
    Job,
    JobAccepted,
    JobList,
    JobOutcome,
    JobResult,
    NotReady,
    Reason,
)
from toolfleet.api.openapi import KEY, LOCATION, RETRY_AFTER, answer, problem, problems
from toolfleet.api.problems import KEY_HEADER, ApiProblem, problem_of
from toolfleet.api.sse import EVENT_SCHEMA, EventStream
from toolfleet.api.sse import MEDIA_TYPE as SSE_TYPE
from toolfleet.api.views import JOBS_PATH, Views, call_results, result_of
from toolfleet.services.background_jobs.errors import QueueError, QueueUnavailable, StoreError, ToolUnavailable
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService, JobView, Submission
from toolfleet.services.background_jobs.task_models import DEFAULT_TENANT, Status, Tier, derived_job_id

MAX_WAIT_S: Final = 60
ASK_AGAIN_S: Final = 1
"""What a client is asked to wait for a result, where it polls."""
CURSOR: Final = r"^[0-9]{1,15}_job_[0-7][0-9A-HJKMNP-TV-Z]{25}$"

router = APIRouter(prefix=JOBS_PATH, tags=["jobs"])


def _json(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(model.model_dump_json(), status, headers, "application/json")


# -- submit ---------------------------------------------------------------------------------------------------

_UNKNOWN_TOOL: Final = {
    "type": "urn:toolfleet:problem:unknown-tool",
    "title": "Unknown tool",
    "status": 422,
    "detail": "there is no tool 'web_crowl'",
    "instance": JOBS_PATH,
    "nearest": ["web_crawl"],
    "tool_call_id": "call_1",
}
_NOT_ACCEPTED: Final = {
    "type": "urn:toolfleet:problem:queue-unavailable",
    "title": "Queue unavailable",
    "status": 503,
    "detail": "NATS gave no answer in 5 s",
    "instance": JOBS_PATH,
    "job_id": "job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB",
    "accepted": "unknown",
}


@router.post(
    "",
    operation_id="submit_job",
    summary="Submit a job",
    status_code=202,
    response_model=JobAccepted,
    responses={
        200: answer(
            "The job was there already (same Idempotency-Key), or it ran while the caller waited; `fallback_reason` "
            "says why where the queue was asked for.",
            model=JobOutcome,
            headers={**KEY, **LOCATION},
        ),
        202: answer("The job is in the queue, or runs already.", headers={**KEY, **LOCATION}),
        **problems(413, 415, 429, headers=KEY),
        422: problem(
            422,
            "Not valid, and nothing was queued: a field (`path`, `errors`), an unknown tool (`nearest`), arguments "
            "that do not fit the tool's schema (`path` into the arguments, `tool_call_id`), or an Idempotency-Key "
            "that was used with another body (`job_id`).",
            headers=KEY,
            example=_UNKNOWN_TOOL,
        ),
        503: problem(
            503,
            'Not accepted (`accepted: false`), or it can\'t be told (`accepted: "unknown"`): ask again with the same '
            "Idempotency-Key. `job_id` is the id that the job has then.",
            headers=KEY,
            example=_NOT_ACCEPTED,
        ),
    },
    openapi_extra=body_schema(
        NewJob,
        examples={
            "two crawls": {
                "tools": [
                    {"tool_name": "web_crawl", "tool_args": {"url": "https://example.org", "max_pages": 5}},
                    {"tool_name": "web_crawl", "tool_args": {"url": "https://example.com"}, "tool_call_id": "second"},
                ],
                "priority": "high",
            },
            "run it while I wait": {"tools": [{"tool_name": "web_crawl"}], "mode": "sync"},
            "tomorrow": {"tools": [{"tool_name": "web_crawl"}], "run_at": "2030-01-01T00:00:00Z"},
        },
    ),
)
async def submit(
    api: ApiParts, service: Service, key: SubmitKey, new: Annotated[NewJob, Depends(json_body(NewJob))]
) -> Response:
    """Checked before it is queued. A 202 is a promise: the job reaches a terminal status, whatever dies."""
    try:
        submission = await service.submit(new, idempotency_key=key.value, known_key=key.known)
        outcome = None if _goes_on(submission) else await _outcome(api.views, service, submission)
    except (QueueError, StoreError, ToolUnavailable) as error:
        raise _not_accepted(error, key) from error
    headers = {KEY_HEADER: key.value, "Location": api.views.job_url(submission.job_id)}
    if outcome is not None:
        return _json(outcome, 200, headers)
    links = api.views.view_links(JobView(submission.record, submission.task))
    return _json(JobAccepted.model_validate(links), 202, headers)


def _goes_on(submission: Submission) -> bool:
    """Whether the job is to be watched: it is new, or what should have run here runs elsewhere."""
    if submission.ran:
        return False
    ended = submission.record is not None and submission.record.status.terminal
    return submission.created or (submission.fallback_reason is not None and not ended)


async def _outcome(views: Views, service: JobService, submission: Submission) -> JobOutcome:
    record = submission.record
    results = None
    if record is not None:
        job = views.job(JobView(record, None), await service.recent_events(record))
        if record.status.terminal:
            results = call_results(record.task.tools, await service.results(record), record.undecided)
    elif submission.ran:
        job = views.unrecorded(submission)
        results = call_results(submission.task.tools, submission.results or {}, ())
    else:
        job = views.job(JobView(None, submission.task, degraded=True), ())
    return JobOutcome(**dict(job), fallback_reason=submission.fallback_reason, results=results)


def _not_accepted(error: QueueError | StoreError | ToolUnavailable, key: IdempotencyKey) -> ApiProblem:
    """A submit that failed for a part that is down: whether the job may have been accepted, and under which id."""
    unknown = isinstance(error, StoreError) or (isinstance(error, QueueUnavailable) and error.maybe_stored)
    problem = problem_of(
        error, job_id=derived_job_id(DEFAULT_TENANT, key.value), accepted="unknown" if unknown else False
    )
    if unknown:
        problem.detail += "; ask again with the same Idempotency-Key"
    return problem


# -- lists and figures: before /{job_id}, which would take their names for ids ----------------------------------


@router.get("/stats", operation_id="job_stats", summary="The fleet's figures", tags=["fleet"], responses=problems(503))
async def stats(service: Service) -> Stats:
    """Per tier: queued, running, oldest age; totals by status; workers; rates; dead letters; warnings."""
    store, queue, alive = await service.stats()
    return stats_of(store, queue, list(alive), int(time.time() * 1000))


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
    return await _job(api.views, service, view)


async def _job(views: Views, service: JobService, view: JobView) -> Job:
    return views.job(view, await service.recent_events(view.record) if view.record is not None else ())


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
        return _json(waiting, 202, {"Retry-After": str(ASK_AGAIN_S)})
    return _json(result_of(view.record, await service.results(view.record)))


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


# -- control --------------------------------------------------------------------------------------------------


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_job",
    summary="Stop a job",
    status_code=202,
    response_model=CancelOutcome,
    responses={
        200: answer("It was cancelled already.", model=CancelOutcome),
        202: answer("How far the cancel got within a second."),
        **problems(404, 409, 410, 413, 415, 422, 503),
    },
    openapi_extra=body_schema(Reason, optional=True),
)
async def cancel(
    service: Service, job_id: JobIdPath, why: Annotated[Reason, Depends(json_body(Reason, optional=True))]
) -> Response:
    """A queued job ends at once; of a running one the worker and the tool's server are told."""
    receipt = await service.cancel(job_id, reason=why.reason or "requested")
    if receipt.outcome == "ended":
        raise ApiProblem(
            409,
            "illegal-move",
            "The job's status does not allow this",
            f"job {job_id} is {receipt.status.value}: it ended before it could be cancelled",
            job_id=job_id,
            job_status=receipt.status.value,
        )
    told = CancelOutcome(
        job_id=job_id,
        outcome=receipt.outcome,
        reached=receipt.reached,
        still_running=list(receipt.still_running),
        status=receipt.status,
        worker=receipt.worker,
    )
    return _json(told, 200 if receipt.outcome == "already_cancelled" else 202)


@router.post(
    "/{job_id}/retry",
    operation_id="retry_job",
    summary="Run what did not succeed again",
    status_code=202,
    responses={
        202: answer("A new generation of the job; stored results of calls that succeeded stay.", headers=LOCATION),
        **problems(404, 409, 410, 413, 415, 422, 503),
    },
    openapi_extra=body_schema(Reason, optional=True),
)
async def retry(
    api: ApiParts,
    service: Service,
    response: Response,
    job_id: JobIdPath,
    why: Annotated[Reason, Depends(json_body(Reason, optional=True))],
) -> Job:
    """Of a failed or cancelled job."""
    view = await service.retry(job_id, reason=why.reason or "retry")
    response.headers["Location"] = api.views.job_url(job_id)
    return await _job(api.views, service, view)


@router.post(
    "/{job_id}/resolve",
    operation_id="resolve_call",
    summary="Decide a call whose outcome is not known",
    responses={
        200: answer("The job as it stands now: with the last decision a new generation has begun."),
        404: problem(404, "There is no such job, or it has no such call."),
        **problems(409, 410, 413, 415, 422, 503),
    },
    openapi_extra=body_schema(
        Decision,
        examples={
            "it did not happen": {"tool_call_id": "call_1", "decision": "rerun"},
            "it happened": {"tool_call_id": "call_1", "decision": "completed", "result": {"order": 4711}},
        },
    ),
)
async def resolve(
    api: ApiParts,
    service: Service,
    job_id: JobIdPath,
    decision: Annotated[Decision, Depends(json_body(Decision))],
) -> Job:
    """A person's word on one call of an `unknown` job; it counts once."""
    view = await service.resolve(
        job_id, decision.tool_call_id, decision.decision, result=decision.result, note=decision.note
    )
    return await _job(api.views, service, view)
