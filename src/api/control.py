"""Routes that change jobs: cancel, retry, resolve."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from toolfleet.api.bodies import body_schema, json_body
from toolfleet.api.dependencies import ApiParts, JobIdPath, Service, UserName, known_query
from toolfleet.api.models import CancelOutcome, Decision, Job, Reason, StoppedCallState
from toolfleet.api.openapi import LOCATION, answer, problem, problems
from toolfleet.api.problems import ApiProblem
from toolfleet.api.views import JOBS_PATH, json_answer, whole_job

router = APIRouter(prefix=JOBS_PATH, tags=["jobs"], dependencies=[Depends(known_query)])


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
        calls=[
            StoppedCallState(tool_call_id=call.tool_call_id, tool_name=call.tool_name, state=call.state)
            for call in receipt.calls
        ],
        still_running=list(receipt.still_running),
        status=receipt.status,
        worker=receipt.worker,
    )
    return json_answer(told, 200 if receipt.outcome == "already_cancelled" else 202)


@router.post(
    "/{job_id}/retry",
    operation_id="retry_job",
    summary="Run what did not succeed again",
    status_code=202,
    responses={
        202: answer(
            "A new generation of the job has begun. Results of calls that succeeded stay and these calls do not run "
            "again; calls without a result run, and so do those whose result says that they failed: that result goes.",
            headers=LOCATION,
        ),
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
    user: UserName = None,
) -> Job:
    """Of a failed or cancelled job, also one that ended by a time-out or as a dead letter, whose letters then go.

    A call that must not run twice and failed with the tool's or the server's own word is run again by this: it is a
    person's word. One whose outcome is not known makes the job `unknown`, which `resolve` is for.
    """
    view = await service.retry(job_id, reason=why.reason or "retry", by=user or "")
    response.headers["Location"] = api.views.job_url(job_id)
    return await whole_job(api.views, service, view)


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
    user: UserName = None,
) -> Job:
    """A person's word on one call of an `unknown` job; it counts once.

    While other calls are undecided the job stays `unknown`, and `decisions` tells this one. The last decision begins a
    new generation, whose first event, `job.queued`, tells all of them, with who and why.
    """
    view = await service.resolve(
        job_id,
        decision.tool_call_id,
        decision.decision,
        result=decision.result,
        note=decision.note,
        by=user or "",
    )
    return await whole_job(api.views, service, view)
