"""The route that takes jobs."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Depends, Response

from toolfleet.api.bodies import body_schema, json_body
from toolfleet.api.dependencies import ApiParts, IdempotencyKey, Parts, SubmitKey, known_query
from toolfleet.api.models import JobAccepted, JobOutcome
from toolfleet.api.openapi import KEY, LOCATION, answer, problem, problems
from toolfleet.api.problems import KEY_HEADER, ApiProblem, problem_of
from toolfleet.api.views import JOBS_PATH, Views, call_results, json_answer
from toolfleet.services.background_jobs.errors import QueueError, QueueUnavailable, StoreError, ToolUnavailable
from toolfleet.services.background_jobs.job_control import JobView
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.submission import Submission
from toolfleet.services.background_jobs.task_models import DEFAULT_TENANT, derived_job_id

router = APIRouter(prefix=JOBS_PATH, tags=["jobs"], dependencies=[Depends(known_query)])

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
    api: ApiParts,
    wired: Parts,
    key: SubmitKey,
    new: Annotated[NewJob, Depends(json_body(NewJob))],
) -> Response:
    """Checked before it is queued. A 202 is a promise: the job reaches a terminal status, whatever dies."""
    service = wired.service
    try:
        if (mismatch := wired.core.queue_state.mismatch) is not None:
            # Found after the start: what is published into a stream with other settings may be lost.
            raise mismatch
        submission = await service.submit(new, idempotency_key=key.value, known_key=key.known)
        outcome = None if _goes_on(submission) else await _outcome(api.views, service, submission)
    except (QueueError, StoreError, ToolUnavailable) as error:
        raise _not_accepted(error, key) from error
    headers = {KEY_HEADER: key.value, "Location": api.views.job_url(submission.job_id)}
    if outcome is not None:
        return json_answer(outcome, 200, headers)
    links = api.views.view_links(JobView(submission.record, submission.task))
    accepted = JobAccepted.model_validate({**links, "degraded": submission.record is None})
    return json_answer(accepted, 202, headers)


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
