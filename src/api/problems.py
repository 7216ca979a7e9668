"""Every error as `application/problem+json` (RFC 9457): toolfleet's own, FastAPI's, and those nobody expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from toolfleet.services.background_jobs.errors import (
    CallNotFound,
    DeadLetterNotFound,
    IdempotencyConflict,
    IllegalMove,
    InvalidArguments,
    InvalidCursor,
    InvalidTask,
    JobExpired,
    JobNotFound,
    QueueError,
    QueueFull,
    StoreError,
    TaskTooLarge,
    ToolfleetError,
    ToolUnavailable,
    UnknownTool,
)

log = structlog.get_logger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
KEY_HEADER: Final = "Idempotency-Key"
USER_HEADER: Final = "X-Toolfleet-User"
RETRY_AFTER_S: Final = 5
"""What a client is asked to wait where a part is down or full: about as long as a part needs to come back."""
MAX_ERRORS: Final = 20
MAX_NAME: Final = 100
"""Characters of a stranger's field name that are repeated in an answer."""

_KINDS: Final[Sequence[tuple[type[ToolfleetError], int, str, str]]] = (
    (UnknownTool, 422, "unknown-tool", "Unknown tool"),
    (InvalidArguments, 422, "invalid-arguments", "Arguments do not fit the tool"),
    (IdempotencyConflict, 422, "idempotency-conflict", "Idempotency-Key used with another body"),
    (TaskTooLarge, 413, "too-large", "Job too large"),
    (InvalidTask, 422, "invalid-request", "Invalid request"),
    (InvalidCursor, 422, "invalid-request", "Invalid request"),
    (JobExpired, 410, "job-expired", "Job expired"),
    (CallNotFound, 404, "call-not-found", "Call not found"),
    (JobNotFound, 404, "job-not-found", "Job not found"),
    (DeadLetterNotFound, 404, "dead-letter-not-found", "Dead letter not found"),
    (IllegalMove, 409, "illegal-move", "The job's status does not allow this"),
    (QueueFull, 429, "queue-full", "Queue full"),
    (QueueError, 503, "queue-unavailable", "Queue unavailable"),
    (StoreError, 503, "store-unavailable", "Job store unavailable"),
    (ToolUnavailable, 503, "tools-unavailable", "Tools unavailable"),
)
"""Which error is which answer; the first that fits."""

_TOLD: Final = ("nearest", "path", "errors", "job_id", "tool_call_id", "size", "limit", "tier", "waiting")
"""Details of an error that become extension members; others stay inside."""


class Problem(BaseModel):
    """An error. Further members tell more: `nearest`, `path`, `errors`, `job_id`, `accepted`, …"""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:toolfleet:problem:unknown-tool"])
    """Names the kind of error for programs; `about:blank` where the status says all."""
    title: str
    status: int
    detail: str
    """What happened, to what, and what to do."""
    instance: str
    """The path that was asked for."""


class ApiProblem(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        code: str | None,
        title: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.type = f"urn:toolfleet:problem:{code}" if code else "about:blank"
        self.title = title
        self.detail = detail
        self.headers = dict(headers or {})
        self.members = members
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S))


def problem_of(error: ToolfleetError, **members: Any) -> ApiProblem:
    """The answer that an error of the services is; Retry-After is what the error knows of it, or a default."""
    told = {name: error.details[name] for name in _TOLD if error.details.get(name) is not None}
    if "status" in error.details:
        told["job_status"] = error.details["status"]
    for kind, status, code, title in _KINDS:
        if isinstance(error, kind):
            known = error.details.get("retry_after")
            headers = {"Retry-After": str(known)} if known is not None else None
            return ApiProblem(status, code, title, str(error), headers=headers, **told | members)
    log.error("api.unmapped_error", kind=type(error).__name__, error=str(error))
    return _internal()


def _internal() -> ApiProblem:
    return ApiProblem(
        500,
        "internal",
        "Internal error",
        "the API failed; what happened stands in its log under the time of this answer",
    )


def invalid_request(found: Sequence[Mapping[str, Any]], where: str | None = None) -> ApiProblem:
    """The answer to pydantic's errors; their input is never repeated.

    Args:
        found: as `ValidationError.errors` gives them.
        where: `body`, where the locations do not begin with the part of the request.
    """
    errors = [_told(error, where) for error in found[:MAX_ERRORS]]
    first = errors[0]
    detail = f"{first['in']} {first['path']}: {first['message']}"
    if len(found) > 1:
        detail += f" (and {len(found) - 1} more)"
    return ApiProblem(422, "invalid-request", "Invalid request", detail, path=first["path"], errors=errors)


def _told(error: Mapping[str, Any], where: str | None) -> dict[str, str]:
    place = [str(part)[:MAX_NAME] if isinstance(part, str) else part for part in error["loc"]]
    part = where or str(place.pop(0) if place else "request")
    path = "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return {"in": part, "path": path, "message": str(error["msg"]).removeprefix("Value error, ")}


def invalid_body(error: ValidationError) -> ApiProblem:
    """The answer to a body that is not JSON, or not what the operation takes."""
    return invalid_request(error.errors(include_url=False, include_input=False, include_context=False), "body")


def problem_response(request: Request, problem: ApiProblem) -> Response:
    """The problem as it is sent; with the request's Idempotency-Key, so that a client can ask again with it."""
    members = {
        **problem.members,
        "type": problem.type,
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "instance": quote(request.scope["path"]),
    }
    headers = problem.headers
    if key := getattr(request.state, "idempotency_key", None):
        headers = {**headers, KEY_HEADER: key}
    return Response(to_json(members, inf_nan_mode="null"), problem.status, headers, MEDIA_TYPE)


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Give an app with these routes these answers."""

    async def own(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiProblem)
        return problem_response(request, error)

    async def of_services(request: Request, error: Exception) -> Response:
        assert isinstance(error, ToolfleetError)
        # A client that asks for many jobs at once wants to know which one an answer is about.
        asked = {"job_id": request.path_params["job_id"]} if "job_id" in request.path_params else {}
        return problem_response(request, problem_of(error, **asked))

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem_response(request, invalid_request(error.errors()))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        title = HTTPStatus(error.status_code).phrase
        detail = str(error.detail) if error.detail != title else _explained(request, error.status_code, title)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed(request, routes) or headers.get("Allow", "")
        return problem_response(request, ApiProblem(error.status_code, None, title, detail, headers=headers))

    async def of_bugs(request: Request, error: Exception) -> Response:
        # Starlette raises it again after this answer, so the server logs it with its traceback.
        return problem_response(request, _internal())

    app.add_exception_handler(ApiProblem, own)
    app.add_exception_handler(ToolfleetError, of_services)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, of_bugs)


def _allowed(request: Request, routes: Sequence[BaseRoute]) -> str:
    """The methods of all routes of this path; Starlette names those of the first one."""
    fits = [r for r in routes if isinstance(r, Route) and r.matches(request.scope)[0] is not Match.NONE]
    # What has a path of its own is not an id that another route would take it for.
    own = [route for route in fits if route.path == request.scope["path"]]
    return ", ".join(sorted({method for route in own or fits for method in route.methods or ()}))


def _explained(request: Request, status: int, title: str) -> str:
    if status == 404:
        return "there is nothing at this path; GET /openapi.json lists what there is"
    if status == 405:
        return f"{request.method} is not possible here; the header Allow lists what is"
    return title
